"""Kernels of the token trees against the step's state on the host, for `stagedspec check`. All must be exact."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from stagedspec.check.kernels import CONTEXT, expect
from stagedspec.kernels import reference
from stagedspec.kernels.common.constants import CONTEXT_LOGPROB
from stagedspec.kernels.state import device as device_state
from stagedspec.kernels.state import host as host_state
from stagedspec.kernels.state import host_growth
from stagedspec.kernels.tree_attention import mask_words
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.tree import TreeConfig
from stagedspec.tuning.workloads import LookupWorkload, random_text

LENGTHS = 20, 3, 9  # of the sequences whose trees are grown


def check_lookup(table: KatzTable, device: torch.device) -> str:
    lookup = LookupWorkload(16, CONTEXT, len(LENGTHS), table, device)
    lookup.logprobs.fill_(torch.nan)
    tokens, logprobs = (tensor.tolist() for tensor in lookup.lookup())
    for row, sequence in enumerate(lookup.sequence.tolist()):
        follower = host_state.Row(sequence, len(sequence)).follower
        for node, (first, last) in enumerate(lookup.contexts[row].tolist()):
            found = follower.get((first, last))
            wanted = [] if found is None else [(found, CONTEXT_LOGPROB)]
            wanted += [pair for pair in table.successors_of(first, last) if pair[0] != found]
            pairs = zip(tokens[row][node], logprobs[row][node], strict=True)
            expect([pair for pair in pairs if pair[0] >= 0] == wanted, f"what follows {first}, {last} differs")
    return "exact"


class Drafting:
    """Trees grown by the host and by the device over the same sequences and the same proposals.

    Proposals are multiples of 1/16, so that sums of them are exact and often tied.
    """

    def __init__(self, model: GPT2, table: KatzTable, tree: TreeConfig, seed: int | None, ends: bool = False):
        self.vocab, self.tree, self.random = model.vocab_size, tree, random.Random(1)
        prompts = [random_text(1, length, self.vocab)[0].tolist() for length in LENGTHS]
        eos, new_tokens = (range(self.vocab // 4), 5) if ends else ((), 100)
        device = model.device
        self.host = host_state.Sequences(prompts, new_tokens, eos, torch.device("cpu"))
        self.ours = device_state.Sequences(prompts, new_tokens, eos, device)
        noise = host_noise = None
        if seed is not None:
            seeds, streams = torch.tensor([seed] * len(prompts)), torch.zeros(len(prompts), dtype=torch.int32)
            host_noise = _HostNoise(seed, self.host, self.vocab)
            noise = SimpleNamespace(seeds=seeds.to(device), streams=streams.to(device))
        self.host_growth = host_growth.Growth(self.host, tree, table, host_noise, torch.float32)
        self.growth = device_state.Growth(self.ours, tree, table, noise)

    def passes(self) -> Iterator[tuple[object, host_state.Batch]]:
        """The inputs of each draft pass of a step, the device's and the host's."""
        for number in range(self.tree.passes):
            theirs, batch = self.host_growth.batch(number), self.growth.batch(number)
            yield batch, theirs
            proposed = self.proposals(batch.nodes)
            self.host_growth.record(*proposed)
            self.growth.record(*(tensor.to(batch.tokens.device) for tensor in proposed))

    def proposals(self, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct children of each node, less and less likely: [B, N, C]."""
        rows, count = len(self.host.rows), min(self.tree.children, self.vocab)
        names = [[self.random.sample(range(self.vocab), count) for _ in range(nodes)] for _ in range(rows)]
        values = [
            [sorted((-self.random.randint(1, 48) / 16 for _ in range(count)), reverse=True) for _ in range(nodes)]
            for _ in range(rows)
        ]
        return torch.tensor(names, dtype=torch.int32), torch.tensor(values)


class _HostNoise:
    """Noise of single tokens, from the reference."""

    def __init__(self, seed: int, sequences: host_state.Sequences, vocab: int):
        self.seed, self.sequences, self.vocab = torch.tensor([seed]), sequences, vocab

    def of(self, row: int, depths: list[int], tokens: list[int]) -> list[float]:
        positions = torch.tensor([[self.sequences.lengths[row] + depth for depth in depths]])
        noise = reference.gumbel_noise(self.seed, torch.zeros(1, dtype=torch.long), positions, self.vocab)
        return noise[0, torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def check_growth(model: GPT2, table: KatzTable, tree: TreeConfig, seed: int | None) -> str:
    drafting = Drafting(model, table, tree, seed)
    for number, (batch, theirs) in enumerate(drafting.passes()):
        same = _same_inputs(batch, theirs, tree.slots, drafting.host.lengths)
        expect(same, f"the inputs of draft pass {number} differ")
    host, ours = drafting.host_growth.harvest(), drafting.growth.harvest()
    for row, one in enumerate(host.trees):
        count = len(one.nodes)
        expect(ours.tree[:, row, :count].tolist() == one.device_fields, "the finished tree differs")
        expect(bool((ours.tree[1, row, count:] == -1).all()), "the finished tree has too many nodes")
    same = _same_inputs(ours.batch(), host.batch(torch.float32), host.nodes, drafting.host.lengths)
    expect(same, "the inputs of the target's pass differ")
    return "exact"


def _same_inputs(batch: Any, theirs: host_state.Batch, region: int, lengths: list[int]) -> bool:
    """Whether a pass has the same inputs on the device as on the host.

    region: rows of the host's tree region. The host's nodes come first on the device.
    """
    count = theirs.tokens.shape[1]
    visible = theirs.bias[:, 0] == 0
    masks = mask_words(F.pad(visible[..., :region], (0, 32 * batch.masks.shape[2] - region)))
    noise = [[max(length + depth, 0) for depth in row] for length, row in zip(lengths, theirs.depths, strict=True)]
    return (
        batch.tokens[:, :count].tolist() == theirs.tokens.tolist()
        and batch.positions[:, :count].tolist() == theirs.positions.tolist()
        and batch.noise_positions[:, :count].tolist() == noise
        and batch.prefix.tolist() == visible[:, 0, region:].sum(-1).tolist()
        and torch.equal(batch.masks[:, :count].cpu(), masks)
    )


def check_verify(model: GPT2, table: KatzTable, tree: TreeConfig) -> str:
    """For a target that follows part of the tree, with and without end-of-sequence tokens and length limits reached."""
    for ends in (False, True):
        drafting = Drafting(model, table, tree, None, ends)
        for _ in drafting.passes():
            pass
        host, ours = drafting.host_growth.harvest(), drafting.growth.harvest()
        ours.load(host.trees)
        chosen = torch.zeros(len(host.trees), tree.nodes, dtype=torch.int32)
        for row, one in enumerate(host.trees):
            below = dict(one.children.keys())  # the last of several children
            chosen[row] = torch.tensor([below.get(node, node % model.vocab_size) for node in range(tree.nodes)])
        wanted, moves = host.verify_commit(chosen[:, : host.nodes]), ours.verify_commit(chosen.to(model.device))
        expect(moves.accepted.tolist() == wanted.accepted, "the number of accepted tokens differs")
        expect(_pairs(moves.target) == wanted.target_rows(0), "the target's KV rows to move differ")
        expect(_pairs(moves.draft) == wanted.draft_rows(), "the draft's KV rows to move differ")
        for known, found in zip(drafting.host.rows, drafting.ours.rows, strict=True):
            same = (known.tokens, known.origins, known.running) == (found.tokens, found.origins, found.running)
            expect(same, "the committed tokens differ")
    return "exact"


def _pairs(moves: torch.Tensor) -> list[list[tuple[int, int]]]:
    """The moves of each row without the padding."""
    rows = zip(*moves.tolist(), strict=True)
    return [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in rows]
