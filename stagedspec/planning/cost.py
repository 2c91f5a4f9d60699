"""The cost model that picks a tree: measured pass times against expected accepted tokens.

After Sequoia (Chen et al., arXiv 2402.12374): the value of a node is the probability that its whole path is accepted,
the product of the acceptance rates of the ranks along it; the best tree of N nodes is grown greedily; the best N
maximises expected tokens over the time of a step.
"""

import heapq
import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as memoise

import torch

from stagedspec.kernels.backends.interface import Backend
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.models.gpt2 import GPT2, Cache
from stagedspec.planning.tree import TreeConfig

# Acceptance profiles of the embedded draft, greedy and sampled (top-k 50, T=1, shared noise): text is a mixture of
# easy, middling and hard parts, each (share of the text, how often the target takes the draft's first, second, ...
# child, how often draft² names the draft's first child). Fitted to counted tokens, nodes and passes a step of 14 greedy
# and 14 sampled trees. Real trees grow where the draft is sure, which a profile does not model: so these rates are a
# little higher than those of the text. They are a prior for the shape of the tree, and rather too easy than too hard,
# since trees adapt downwards: `stagedspec tune-tree` measures those of a pair.
AcceptanceProfile = tuple[float, tuple[float, ...], float]
PROFILES: dict[bool, tuple[AcceptanceProfile, ...]] = {
    False: (
        (0.096, (0.993, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.01),
        (0.797, (0.986, 0.014, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.99),
        (0.107, (0.491, 0.074, 0.071, 0.068, 0.065, 0.063, 0.06, 0.058), 0.01),
    ),
    True: (
        (0.397, (0.927, 0.05, 0.015, 0.005, 0.001, 0.0, 0.0, 0.0), 0.94),
        (0.252, (0.775, 0.091, 0.008, 0.001, 0.0, 0.0, 0.0, 0.0), 0.15),
        (0.351, (0.334, 0.09, 0.078, 0.067, 0.058, 0.05, 0.043, 0.037), 0.06),
    ),
}
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
CHILDREN = 8
CONTEXT = 128  # prefix length that passes are measured at
# What is tried.
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PASSES = (1, 2, 3, 4, 6)
PREFETCH = (1, 2, 4, 6, 8)
NODE_FLOORS = (0.0, 0.03, 0.06)
PASS_FLOORS = (0.0, 0.5, 0.65, 0.8)
BUDGET, ROUNDS = 0.2, 20  # seconds that a measurement may take, and how often it is repeated in them
TOGETHER = 16  # up to so many rows all sizes are measured in turn, where each size costs no kernels of its own


class PassTimes:
    """Seconds of one pass of the target and of the draft by number of rows, measured at first use.

    A pass ends with the choice of its tokens. The target runs once before every timed pass: in a generation too, the
    draft's pass finds the caches full of the target's weights.
    """

    def __init__(self, target: GPT2, draft: GPT2, known: dict[tuple[bool, int, int, bool], float] | None = None):
        """known: measured before, by (whether of the draft, batch, rows, sampled)."""
        self.target, self.draft = target, draft
        self.rows = target.ops.timed_rows
        self.together = self.rows[-1] if target.ops.compiles_kernels else TOGETHER
        self.seconds = dict(known or {})
        self._passes: dict[tuple[bool, int, int, bool], Callable] = {}  # that are ready to be measured

    def target_pass(self, batch: int, nodes: int, sampled: bool) -> float:
        return self._interpolate(False, batch, nodes, sampled)

    def draft_pass(self, batch: int, nodes: int, sampled: bool) -> float:
        return self._interpolate(True, batch, nodes, sampled)

    def _interpolate(self, draft: bool, batch: int, nodes: float, sampled: bool) -> float:
        if self.target.ops.compiles_kernels:  # for powers of two of rows: fewer take as long
            nodes = 2 ** math.ceil(math.log2(batch * nodes)) / batch
        above = next((size for size in self.rows if size >= nodes), self.rows[-1])
        below = max((size for size in self.rows if size <= nodes), default=above)
        low, high = self._measure(draft, batch, below, sampled), self._measure(draft, batch, above, sampled)
        if above == below:
            return high * max(1.0, nodes / above)
        return low + (high - low) * (nodes - below) / (above - below)

    def _measure(self, draft: bool, batch: int, nodes: int, sampled: bool) -> float:
        if (draft, batch, nodes, sampled) not in self.seconds:
            # All sizes in turn: a moment in which the machine is busy must not fall on one of them alone.
            keys = self._unknown(draft, batch, max(nodes, self.together), sampled)
            before = False, batch, 1, False
            self._make([*keys, before])
            least = _least_times(self.target, [self._passes[key] for key in keys], self._passes[before])
            # Noise aside, fewer rows never take longer than more.
            for index, key in enumerate(keys):
                self.seconds[key] = min(least[index:])
                self._passes.pop(key, None)
        return self.seconds[draft, batch, nodes, sampled]

    def knows(self, batch: int, sampled: bool) -> bool:
        """Whether passes of this kind were measured before."""
        return (False, batch, 1, sampled) in self.seconds

    def prepare(self, batch: int, sampled: bool) -> None:
        """Compiles the passes of both models that choosing a tree will measure, all in parallel."""
        keys = self._unknown(False, batch, self.rows[-1], sampled) + self._unknown(True, batch, self.together, sampled)
        if keys:
            self._make([*keys, (False, batch, 1, False)])

    def release(self) -> None:
        """Frees what was made ready and not measured."""
        self._passes.clear()

    def _unknown(self, draft: bool, batch: int, most: int, sampled: bool) -> list[tuple[bool, int, int, bool]]:
        keys = [(draft, batch, size, sampled) for size in self.rows if size <= most]
        return [key for key in keys if key not in self.seconds]

    def _make(self, keys: Sequence[tuple[bool, int, int, bool]]) -> None:
        ops = self.target.ops
        for key in keys:
            if key not in self._passes:
                model = self.draft if key[0] else self.target
                self._passes[key] = ops.repeated(timed_pass(model, *key))
        ops.prepare([(self._passes[key], ()) for key in keys], self.target.device)


def timed_pass(model: GPT2, draft: bool, batch: int, nodes: int, sampled: bool) -> Callable[[], object]:
    """A pass over `nodes` nodes of each of `batch` sequences, up to the choice of its tokens."""
    ops, device = model.ops, model.device
    context = min(CONTEXT, model.positions - 1)
    tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
    inputs, tree_rows = ops.timed_batch(tokens, context, model.kv_dtype)
    cache = Cache(model, batch, tree_rows, context + nodes - tree_rows)
    write = 0 if tree_rows else context
    noise, warping = None, None
    if sampled:
        sequences = ops.make_sequences([[0] * context] * batch, nodes, (), device)
        limits, warping = [context + nodes] * batch, SAMPLED
        maker = ops.make_noise([0] * batch, list(range(batch)), model.vocab_size, nodes, limits, device)
        maker.advance(sequences)
        noise = maker.at(inputs)

    @torch.inference_mode()
    def run() -> object:
        if draft:
            return model.children(inputs, cache, write, 0, min(CHILDREN, model.vocab_size), warping, noise)
        return model.choose(inputs, cache, write, 0, warping, noise)

    return run


def _least_times(model: GPT2, runs: Sequence[Callable], before: Callable) -> list[float]:
    """The least time of each of `runs` in up to ROUNDS rounds after a warm-up, each run after `before`; rounds end when
    BUDGET seconds a run are spent.

    What else runs on the machine only adds.
    """
    ops, device = model.ops, model.device
    for run in runs:
        run()
    least = [math.inf] * len(runs)
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            before()
            least[index] = min(least[index], ops.seconds(run, device))
        if time.perf_counter() - begin > BUDGET * len(runs):
            break
    return least


@dataclass(frozen=True)
class Expected:
    """Steps in text of one profile: share of all steps; tokens (bonus included), nodes and draft passes of each."""

    share: float
    tokens: float
    nodes: int
    passes: int


def expected(config: TreeConfig, profiles: Sequence[AcceptanceProfile]) -> list[Expected]:
    """Expected steps with the tree `config`, for each profile.

    Every chain of guesses is taken to be right as far as one is on average: where that is no whole number, as far as
    the whole numbers beside it, in a part of the steps each. Where it breaks is known when the next pass is made.
    """
    found = []
    for share, ranks, hit in profiles:
        right = sum(hit**level for level in range(1, config.prefetch + 1))
        more = right % 1.0
        kinds = []
        for part, guesses in ((1.0 - more, math.floor(right)), (more, math.ceil(right))):
            if part > 0.0:
                passes, values = _grown(
                    config.depth, config.passes, config.width, guesses, config.prefetch_width, config.pass_floor,
                    ranks[: config.children],
                )  # fmt: skip
                count = min(config.nodes - 1, bisect_right(values, -config.node_floor, key=lambda value: -value))
                kinds.append(Expected(part, 1.0 + sum(values[:count]), 1 + count, passes))
        tokens = sum(kind.share * kind.tokens for kind in kinds)
        found += [replace(kind, share=kind.share * share / tokens) for kind in kinds]
    steps = sum(kind.share for kind in found)
    return [replace(kind, share=kind.share / steps) for kind in found]


@memoise
def _grown(
    depth: int, passes: int, width: int, guesses: int, prefetch_width: int, pass_floor: float, ranks: tuple[float, ...]
) -> tuple[int, list[float]]:
    """The passes run, and the values of all candidates, best first, if every node's children were accepted
    independently, by rank, and `guesses` levels of guesses below a node were right."""
    values: list[float] = []
    waiting: list[tuple[float, int]] = []  # candidates not evaluated yet: (-value, depth)

    def evaluate(value: float, level: int, guesses: int) -> None:
        for rank, rate in enumerate(ranks):
            child = value * rate
            values.append(child)
            if level + 1 >= depth:
                continue
            if rank == 0 and guesses > 0:
                evaluate(child, level + 1, guesses - 1)
            else:
                heapq.heappush(waiting, (-child, level + 1))

    for number in range(passes):
        count = min(width, len(waiting))
        if number and (not count or -waiting[0][0] < pass_floor):
            return number, sorted(values, reverse=True)
        wanted = [(-1.0, 0)] if number == 0 else [heapq.heappop(waiting) for _ in range(count)]
        for index, (value, level) in enumerate(wanted):
            evaluate(-value, level, guesses if index < prefetch_width else 0)
    return passes, sorted(values, reverse=True)


class Model:
    """Predicts tokens and seconds of a step with any tree, for one pair of models, batch size and way of choosing.

    profiles: acceptance profiles of the draft; None: those of the embedded one. ops: the backend, whose limits apply,
    or None.
    """

    def __init__(
        self,
        times: PassTimes,
        batch: int,
        sampled: bool,
        profiles: Sequence[AcceptanceProfile] | None = None,
        ops: Backend | None = None,
    ):
        self.times, self.batch, self.sampled, self.ops = times, batch, sampled, ops
        self.overheads = (ops or TorchBackend).overheads
        self.profiles = PROFILES[sampled] if profiles is None else tuple(profiles)
        self._rankings: dict[str, list[TreeConfig]] = {}

    def verify_seconds(self, nodes: int) -> float:
        """Of a step without its draft passes."""
        passing = self.times.target_pass(self.batch, nodes, self.sampled)
        return passing + self.overheads.step + self.overheads.node * nodes

    def draft_seconds(self, config: TreeConfig, number: int) -> float:
        """Of the draft pass `number` of a step."""
        rows = (config.width if number else 2) + config.guesses
        beyond = self.overheads.draft_pass + self.overheads.row * rows + (0.0 if number else self.overheads.drafting)
        return self.times.draft_pass(self.batch, rows, self.sampled) + beyond

    def read_seconds(self) -> float:
        """Of one more token of every row that the draft reads."""
        rows = self.times.together
        return self.times.draft_pass(self.batch, rows, self.sampled) / rows

    def step(self, config: TreeConfig) -> tuple[float, float]:
        """Expected tokens of a row and seconds of a step. The row that grows longest sets passes and nodes for all."""
        tokens, seconds, below = 0.0, 0.0, 0.0
        for kind in sorted(expected(config, self.profiles), key=lambda kind: (kind.passes, kind.nodes)):
            tokens += kind.share * kind.tokens
            longest = (below + kind.share) ** self.batch - below**self.batch
            below += kind.share
            seconds += longest * self._seconds(config, kind)
        return tokens, seconds

    def _seconds(self, config: TreeConfig, kind: Expected) -> float:
        # How many nodes reach a floor varies from step to step around their mean, up to the most there may be.
        apart = min(kind.nodes // 2, config.nodes - kind.nodes) if config.node_floor else 0
        sizes = (kind.nodes - apart, kind.nodes, kind.nodes + apart)
        verify = sum(self.verify_seconds(size) for size in sizes) / len(sizes)
        return verify + sum(self.draft_seconds(config, number) for number in range(kind.passes))

    def tokens_per_second(self, config: TreeConfig) -> float:
        """Predicted tokens a second of each row."""
        tokens, seconds = self.step(config)
        return tokens / seconds

    def finalists(self, mode: str, most: int) -> list[TreeConfig]:
        """The best tree of each size, best first, at most `most`. Predictions are not exact enough to tell
        neighbouring sizes apart."""
        found: dict[int, TreeConfig] = {}
        for tree in self._ranked(mode):
            found.setdefault(tree.nodes, tree)
        return list(found.values())[:most]

    def levels(self, mode: str, full: TreeConfig | None = None) -> list[TreeConfig]:
        """The trees that a generation adapts between, smallest first. The last is `full`, or the tree with the most
        expected tokens a second; before it come the best trees of at most a quarter and a half of its nodes and passes:
        where a tree has kernels and a graph of its own, of a quarter alone.
        """
        ranked = self._ranked(mode)
        full = full or ranked[0]
        chosen = [full]

        def fits(tree: TreeConfig, nodes: int, passes: int) -> bool:
            return tree.nodes <= nodes and tree.passes <= passes and tree.depth <= full.depth

        for part in (4,) if self.ops is not None and self.ops.compiles_kernels else (2, 4):
            nodes, passes = max(2, full.nodes // part), max(1, full.passes // part)
            smaller = next((tree for tree in ranked if fits(tree, nodes, passes)), full)
            if smaller not in chosen:
                chosen.insert(0, smaller)
        return chosen

    def _ranked(self, mode: str) -> list[TreeConfig]:
        """The candidates that the backend can run, best first."""
        if mode not in self._rankings:
            ops = self.ops
            found: Sequence[TreeConfig] = candidates(mode)
            if ops is not None:
                found = [t for t in found if t.depth <= ops.max_depth]
                if not ops.skips_passes:  # floors save no time
                    found = [t for t in found if not t.pass_floor and not t.node_floor]
            self._rankings[mode] = sorted(found, key=self.tokens_per_second, reverse=True)
        return self._rankings[mode]


@memoise
def candidates(mode: str) -> tuple[TreeConfig, ...]:
    """All trees that are tried for a mode."""
    found = []
    for nodes, node_floor, pass_floor in itertools.product(SIZES, NODE_FLOORS, PASS_FLOORS):
        if mode == "chain":
            found.append(TreeConfig(nodes, nodes - 1, nodes - 1, 1, 1, 0, node_floor=node_floor, pass_floor=pass_floor))
            continue
        for passes, width, prefetch in itertools.product(PASSES, (1, 2), PREFETCH if mode == "staged" else (0,)):
            certain = 1 + (passes - 1) * width
            if nodes - 1 > CHILDREN * certain or (passes == 1 and (width > 1 or pass_floor)):
                continue
            depth = passes * (1 + prefetch)
            found.append(
                TreeConfig(
                    nodes, depth, passes, width, CHILDREN, prefetch, 1, node_floor=node_floor, pass_floor=pass_floor
                )
            )
    return tuple(found)
