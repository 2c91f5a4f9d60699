"""Growing a step's trees: the draft passes' nodes, and the finished trees."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels import reference
from stagedspec.kernels.state import host as host_state
from stagedspec.kernels.state import host_growth
from stagedspec.tuning.workloads import TreeWorkload, katz_table


def cases(choice: Choice) -> Iterator[Case]:
    for batch, context, nodes in choice.all("batch", "context", "nodes"):
        if nodes == 1:
            continue
        growing = TreeWorkload(nodes, context, batch, katz_table(MODELS["L"].vocab, DEVICE), DEVICE)
        where = {"B": batch, "L": context, "N": nodes}
        passes = growing.config.passes
        run, check = again(partial(growing.passes, harvest=False)), partial(_check, growing)
        yield Case("grow_pass", "L", where, 0, SMALL * passes, run, {}, check, 10.0)
        yield Case("harvest_tree", "L", where, 0, SMALL, again(growing.growth.harvest), {}, check, 10.0)


def on_host(growing: TreeWorkload) -> host_state.Trees:
    """The same trees, grown by the reference."""
    cpu, config = torch.device("cpu"), growing.config
    sequences = host_state.Sequences(growing.prompts, growing.room, [], cpu)
    if not config.passes:
        return host_state.Trees.roots(sequences)
    noise = None
    if growing.sampled:
        seeds, streams = (part.tolist() for part in growing.growth.noise)
        reach = config.depth + 1
        limits = [len(prompt) + reach for prompt in growing.prompts]
        noise = reference.Noise(seeds, streams, growing.table.vocab_size, reach, limits, cpu)
        noise.advance(sequences)
    growth = host_growth.Growth(sequences, config, growing.table.to(cpu), noise, torch.float32)
    for number, (tokens, logprobs) in enumerate(growing.proposed):
        growth.batch(number)
        growth.record(tokens, logprobs)
    return growth.harvest()


def _check(growing: TreeWorkload) -> float:
    trees, wanted = growing.passes(), on_host(growing).trees
    pairs = []
    for row, tree in enumerate(wanted):
        for got, values in zip(trees.tree[:, row].tolist(), tree.device_fields, strict=True):
            pairs.append((got[: len(values)], values))
    return exact(*pairs)
