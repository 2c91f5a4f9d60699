"""The kernels of growing trees as operations: tile sizes, launch settings, launchers, checks of arguments."""

import math
from functools import partial
from typing import NamedTuple, cast

import torch
import triton

from stagedspec.kernels.common.constants import MAX_VOCAB
from stagedspec.kernels.common.inputs import NgramTable, TreeSettings
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.grow_tree.harvest_kernel import harvest_tree_kernel
from stagedspec.kernels.grow_tree.pass_kernel import grow_pass_kernel
from stagedspec.kernels.grow_tree.state import GrowthState, Recorded, words
from stagedspec.kernels.ngram_lookup import Table, check_table, ranks

BLOCK = 512  # positions of the sequence compared at once: a block is a round trip to L2
MAX_CANDIDATES = 16384
# The least and most that tiles hold: smaller trees share compiled kernels, larger ones loop.
LEAST_CANDIDATES, LEAST_NODES, LEAST_WORDS = 512, 16, 2
MOST_OPTIONS = 4096  # of draft², for a level of guesses
MOST_RECORDED = 2048  # candidates recorded together
MOST_RANKS = 128  # of one slot
MOST_PLACED = 2048  # candidates put into a tree together
MOST_COMPARED = 4096  # pairs of nodes
MOST_SEARCHED = 8192  # contexts times positions of the sequence
# On these architectures the kernels spill without `most_registers`.
GROW_SPILLING, HARVEST_SPILLING = (90, 100), (80, 89, 90, 100, 120)


class TreeShape(NamedTuple):
    """The settings of a tree that decide tile sizes, named as in `TreeConfig`, which can be given in its place."""

    width: int
    prefetch: int
    prefetch_width: int
    children: int
    slots: int


def _blocks(tree: TreeShape | TreeSettings, nodes: int = 1) -> dict[str, int]:
    """Tile sizes of a `TreeShape`: powers of two. nodes: of the tree to be harvested, if one is."""
    up = triton.next_power_of_2
    lanes = up(max(tree.width, tree.prefetch_width if tree.prefetch else 1, 2))
    ranks = min(up(max(tree.children, 2)), MOST_RANKS)
    return {
        "LANES": lanes,
        "RECORDED": min(lanes, MOST_RECORDED // ranks),
        "RANKS": ranks,
        "CANDIDATES": up(max(tree.slots * tree.children, lanes, nodes - 1, LEAST_CANDIDATES)),
    }


def pass_constants(tree: TreeShape, successors: int, block: int) -> dict[str, int]:
    """The compile-time arguments of `grow_pass_kernel` that a tree, a table and its settings decide."""
    blocks = _blocks(tree)
    return blocks | {
        "GUESSES": tree.prefetch > 0,
        "CHILDREN": tree.children,
        "WORDS_BLOCK": max(triton.next_power_of_2(words(tree.slots)), LEAST_WORDS),
        "SUCCESSORS": successors,
        "NGRAM_RANKS": ranks(successors),
        "BLOCK": min(block, MOST_SEARCHED // blocks["LANES"]),
    }


def harvest_constants(tree: TreeShape, nodes: int) -> dict[str, int]:
    """The compile-time arguments of `harvest_tree_kernel` that a tree decides."""
    up = triton.next_power_of_2
    blocks = _blocks(tree, nodes)
    nodes_block = max(up(nodes - 1), LEAST_NODES)
    return {
        "GROWN": nodes > 1,
        "CHILDREN": tree.children,
        "RECORDED": blocks["RECORDED"],
        "RANKS": blocks["RANKS"],
        "CANDIDATES": blocks["CANDIDATES"],
        "PLACED": min(blocks["CANDIDATES"], MOST_PLACED),
        "NODES_BLOCK": nodes_block,
        "COMPARED": min(nodes_block, MOST_COMPARED // nodes_block),
        "WORDS_BLOCK": max(up(words(nodes)), LEAST_WORDS),
    }


def tile(op: str, config: TreeSettings) -> int:
    """The candidates that grow_pass or harvest_tree looks at together, by which its settings are kept."""
    return _blocks(config, config.nodes if op == "harvest_tree" else 1)["CANDIDATES"]


def default_warps(op: str, size: int) -> int:
    most = 8 if op == "harvest_tree" else 16  # which spills with 16
    return min(most, 4 if size <= 2048 else 8 if size <= 4096 else 16)


def pass_warps(warps: int, constants: dict[str, int]) -> int:
    """Of grow_pass: more than are set where draft²'s options would not fit into their registers."""
    options = constants["LANES"] * constants["NGRAM_RANKS"]
    return warps if options < 2048 else max(warps, 16 if options >= 4096 else 8)


def candidates(op: str, shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings of grow_pass or harvest_tree to try at the shape (tile of candidates,), the default first."""
    every = [{"warps": warps} for warps in (default_warps(op, *shape), 1, 2, 4, 8, 16)]
    if op == "grow_pass":
        every = [one | {"block": block} for block in (BLOCK, 256, 1024) for one in every]
    return [one for index, one in enumerate(every) if one not in every[:index]]


def _settings(op: str, size: int, device: torch.device) -> dict[str, int]:
    return config(op, (size,), device, partial(candidates, op))


# ---------------------------------------------------------------- operations


class Noise(NamedTuple):
    """The seed and the stream of each row's noise; None when greedy."""

    seeds: torch.Tensor | None
    streams: torch.Tensor | None


class Proposed(NamedTuple):
    """The children that the draft proposed in the last pass, and their log-probabilities; None before pass 0."""

    names: torch.Tensor | None
    values: torch.Tensor | None

    @property
    def children(self) -> int:
        return 0 if self.names is None else self.names.shape[2]


class Inputs(NamedTuple):
    """Inputs of a model's pass, which the kernels write (the package's docstring has the shapes)."""

    batch: torch.Tensor
    masks: torch.Tensor
    prefix: torch.Tensor


class PassSettings(NamedTuple):
    """start: the first slot of the pass that is recorded; record: how many of its slots are not guesses; floor: the
    least log-probability of a candidate; the rest as in `TreeConfig`."""

    start: int
    record: int
    floor: float
    width: int
    prefetch: int
    prefetch_width: int
    depth: int
    context: int

    @classmethod
    def of(cls, config: TreeSettings, start: int, record: int) -> "PassSettings":
        floor = math.log(config.node_floor) if config.node_floor else -math.inf
        shape = config.width, config.prefetch, config.prefetch_width, config.depth
        return cls(start, record, floor, *shape, int(config.context))

    def shape(self, state: GrowthState | Recorded) -> TreeShape:
        size = state.slots.shape[2]
        return TreeShape(self.width, self.prefetch, self.prefetch_width, state.candidates.shape[2] // size, size)


def _launch_pass(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    noise: Noise,
    table: Table,
    proposed: Proposed,
    state: GrowthState,
    inputs: Inputs,
    vocab_size: int,
    settings: PassSettings,
) -> None:
    tree = settings.shape(state)
    tuned = _settings("grow_pass", _blocks(tree)["CANDIDATES"], tokens.device)
    constants = pass_constants(tree, table.successors, tuned["block"])
    warps = pass_warps(tuned["warps"], constants)
    launch_kernel(
        grow_pass_kernel,
        (tokens.shape[0],),
        tokens, lengths, *noise, *table, *proposed, *state, *inputs, tokens.shape[1], vocab_size, table.slots,
        settings.start, settings.record, proposed.children, settings.width, settings.prefetch,
        settings.prefetch_width, tree.slots, words(tree.slots), settings.depth, settings.context, settings.floor,
        FIRST=proposed.names is None, SAMPLED=noise.seeds is not None, **constants,
        num_warps=warps, maxnreg=most_registers(architecture(tokens.device), warps, GROW_SPILLING),
        **launch_options(tokens.device),
    )  # fmt: skip


_grow_pass = register(
    "grow_pass(Tensor tokens, Tensor lengths, Tensor? seeds, Tensor? streams, Tensor? keys, Tensor? rows, "
    "Tensor? table_tokens, Tensor? table_logprobs, Tensor? names, Tensor? values, Tensor(a!) slots, "
    "Tensor(b!) slot_masks, Tensor(c!) slot_scores, Tensor(d!) candidates, Tensor(e!) candidate_scores, "
    "Tensor(f!) batch, Tensor(g!) batch_masks, Tensor(h!) prefix, int vocab_size, int start, int record, float floor, "
    "int width, int prefetch, int prefetch_width, int depth, int context) -> ()",
    _launch_pass,
)


def _launch_harvest(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    running: torch.Tensor,
    proposed: Proposed,
    state: Recorded,
    tree: torch.Tensor,
    inputs: Inputs,
    settings: PassSettings,
) -> None:
    shape, nodes = settings.shape(state), tree.shape[2]
    constants = harvest_constants(shape, nodes)
    warps = _settings("harvest_tree", constants["CANDIDATES"], tokens.device)["warps"]
    launch_kernel(
        harvest_tree_kernel,
        (tokens.shape[0],),
        tokens, lengths, running, *proposed, *state, tree, *inputs, tokens.shape[1], settings.start, settings.record,
        proposed.children, settings.prefetch, settings.prefetch_width, shape.slots, settings.depth, nodes,
        words(nodes), settings.floor, **constants,
        num_warps=warps, maxnreg=most_registers(architecture(tokens.device), warps, HARVEST_SPILLING),
        **launch_options(tokens.device),
    )  # fmt: skip


_harvest_tree = register(
    "harvest_tree(Tensor tokens, Tensor lengths, Tensor running, Tensor? names, Tensor? values, Tensor(a!) slots, "
    "Tensor(b!) slot_scores, Tensor(c!) candidates, Tensor(d!) candidate_scores, Tensor(e!) tree, Tensor(f!) batch, "
    "Tensor(g!) batch_masks, Tensor(h!) prefix, int start, int record, float floor, int width, int prefetch, "
    "int prefetch_width, int depth, int context) -> ()",
    _launch_harvest,
)


def check_candidates(name: str, config: TreeSettings) -> None:
    """Raises ValueError for a `TreeConfig` with more candidates than are held together."""
    size, children = max(config.slots, 1), config.children
    if size * children > MAX_CANDIDATES:
        raise ValueError(
            f"{name}: a tree may have at most {MAX_CANDIDATES} candidates on a GPU, got {size} draft evaluations with "
            f"{children} children each; use fewer passes, guesses or children"
        )


def check_options(name: str, config: TreeSettings, table: NgramTable | None) -> None:
    """Raises ValueError for a `TreeConfig` and a table (or None) that give draft² too many options to choose from."""
    if config.prefetch and _options(config, 0 if table is None else table.successors) > MOST_OPTIONS:
        raise ValueError(
            f"{name}: draft² may have at most {MOST_OPTIONS} options a level on a GPU, got a table of "
            f"{0 if table is None else table.successors} successors, width {config.width} and prefetch_width "
            f"{config.prefetch_width}; lower one"
        )


def _options(config: TreeSettings, successors: int) -> int:
    return _blocks(config)["LANES"] * ranks(successors)


def _check_state(name: str, state: GrowthState, batch: int, config: TreeSettings, device: torch.device) -> None:
    check_candidates(name, config)
    size, children = max(config.slots, 1), config.children
    check_tensor(name, "slots", state.slots, (5, batch, size), torch.int32, device)
    check_tensor(name, "slot_masks", state.slot_masks, (batch, size, words(size)), torch.int32, device)
    check_tensor(name, "slot_scores", state.slot_scores, (batch, size), torch.float32, device)
    check_tensor(name, "candidates", state.candidates, (3, batch, size * children), torch.int32, device)
    check_tensor(name, "candidate_scores", state.candidate_scores, (batch, size * children), torch.float32, device)


def _check_proposals(
    name: str, number: int, config: TreeSettings, batch: int, proposed: tuple | None, device: torch.device
) -> Proposed:
    """Checks what the draft proposed in pass `number`."""
    names, values = proposed if proposed is not None else (None, None)
    shape = (batch, pass_size(config, number), None)
    check_tensor(name, "names", names, shape, (torch.int32, torch.int64), device)
    names = cast(torch.Tensor, names)  # the check refuses None
    check_tensor(name, "values", values, tuple(names.shape), torch.float32, device)
    if not 1 <= names.shape[2] <= config.children:
        raise ValueError(f"{name}: names must hold 1 to {config.children} children, got {names.shape[2]}")
    return Proposed(names, values)


def _check_inputs(name: str, inputs: Inputs, rows: int, nodes: int, region: int, device: torch.device) -> None:
    """region: the tree rows that masks have bits for."""
    check_tensor(name, "batch", inputs.batch, (3, rows, nodes), torch.int32, device)
    check_tensor(name, "batch_masks", inputs.masks, (rows, nodes, words(region)), torch.int32, device)
    check_tensor(name, "prefix", inputs.prefix, (rows,), torch.int32, device)


def pass_size(config: TreeSettings, number: int) -> int:
    """The rows of draft pass `number`."""
    return (config.width if number else 2) + config.guesses


def pass_start(config: TreeSettings, number: int) -> int:
    """The first slot of draft pass `number`."""
    return 2 + config.guesses + (number - 1) * pass_size(config, 1) if number else 0


def grow_pass(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    state: GrowthState,
    config: TreeSettings,
    number: int,
    proposed: tuple[torch.Tensor, torch.Tensor] | None,
    table: NgramTable | None,
    noise: tuple[torch.Tensor, torch.Tensor] | None,
    inputs: Inputs,
) -> None:
    """Records what the draft `proposed` in pass number - 1 and writes the inputs of pass `number`.

    tokens int32 [B, S], lengths int32 [B]: what is committed. config: a TreeConfig. proposed: tokens int32 or int64
    and log-probabilities fp32 [B, rows of the last pass, children], descending; None before pass 0. table: a
    `KatzTable`, or None. noise: seeds int64 [B] and streams int32 or int64 [B], or None when greedy. inputs: of the
    draft's pass (the package's docstring has the shapes). Raises ValueError for a wrong shape, dtype, device or layout.
    """
    name, device = "grow_pass", tokens.device
    check_runs(tokens, name)
    check_tensor(name, "tokens", tokens, (None, None), torch.int32, device)
    rows = tokens.shape[0]
    check_tensor(name, "lengths", lengths, (rows,), torch.int32, device)
    _check_state(name, state, rows, config, device)
    if not 0 <= number < config.passes:
        raise ValueError(f"{name}: a step has the passes 0 to {config.passes - 1}, got {number}")
    known = Proposed(None, None)
    if number:
        known = _check_proposals(name, number - 1, config, rows, proposed, device)
    tensors, vocab_size = check_table(name, table, device)
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"{name}: the vocabulary may have at most {MAX_VOCAB} tokens, got {vocab_size}")
    check_options(name, config, table)
    seeds, streams = noise or (None, None)
    if noise is not None:
        check_tensor(name, "seeds", seeds, (rows,), torch.int64, device)
        check_tensor(name, "streams", streams, (rows,), (torch.int32, torch.int64), device)
    count = pass_size(config, number)
    _check_inputs(name, inputs, rows, count, config.slots, device)
    record = (config.width if number > 1 else 2) if number else 0
    settings = PassSettings.of(config, pass_start(config, max(number - 1, 0)), record)
    _grow_pass(tokens, lengths, seeds, streams, *tensors, *known, *state, *inputs, vocab_size, *settings)


def harvest_tree(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    running: torch.Tensor,
    state: GrowthState,
    config: TreeSettings,
    proposed: tuple[torch.Tensor, torch.Tensor] | None,
    tree: torch.Tensor,
    inputs: Inputs,
) -> None:
    """Records what the draft `proposed` in the last pass and writes the finished trees and the target's inputs.

    Arguments as of `grow_pass`; with config.nodes 1 nothing is recorded, and the trees are roots. running int32 [B]:
    ROOT_ALONE where the row's tree must be a root alone. tree int32 [5, B, N].
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    name, device = "harvest_tree", tokens.device
    check_runs(tokens, name)
    check_tensor(name, "tokens", tokens, (None, None), torch.int32, device)
    rows, nodes = tokens.shape[0], config.nodes
    check_tensor(name, "lengths", lengths, (rows,), torch.int32, device)
    check_tensor(name, "running", running, (rows,), torch.int32, device)
    _check_state(name, state, rows, config, device)
    known, number = Proposed(None, None), max(config.passes - 1, 0)
    if nodes > 1:
        known = _check_proposals(name, number, config, rows, proposed, device)
    check_tensor(name, "tree", tree, (5, rows, nodes), torch.int32, device)
    _check_inputs(name, inputs, rows, nodes, nodes, device)
    settings = PassSettings.of(config, pass_start(config, number), config.width if number else 2)
    _harvest_tree(tokens, lengths, running, *known, *state.recorded, tree, *inputs, *settings)
