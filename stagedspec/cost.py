"""The cost model that picks a tree: measured pass times against expected accepted tokens.

After Sequoia (Chen et al., arXiv 2402.12374): a node is worth the probability that its whole path is accepted, the
product of its ancestors' ranks' acceptance rates; the best tree of N nodes is grown greedily; the best N maximises
expected tokens over the time of a step.
"""

import heapq
import statistics
import time
from collections.abc import Callable
from functools import cache as memoise

import torch

from stagedspec.gpt2 import GPT2, Cache
from stagedspec.tree import TreeConfig

# How text lies before the draft, greedy and sampled (top-k 50, T=1, shared noise): a mixture of easy and hard
# stretches, (share, how often the target takes the draft's first, second, ... child, how often draft² names the draft's
# first child). The mean over the stretches was measured by bench/ranks.py with the embedded trio on prompts that
# bench/decode.py does not use; the split was fitted to the tokens per step of 8 trees on 10 of them (within 7%; without
# it, large trees come out up to 28% too small). A prior for the shape of the tree, not a result.
STRETCHES = {
    False: (
        (0.4, (0.99, 0.004, 0.001, 0.001, 0.0, 0.0, 0.0, 0.0), 0.9),
        (0.6, (0.76, 0.096, 0.032, 0.018, 0.011, 0.01, 0.008, 0.005), 0.4),
    ),
    True: (
        (0.4, (0.75, 0.069, 0.037, 0.019, 0.014, 0.01, 0.007, 0.006), 0.9),
        (0.6, (0.382, 0.171, 0.091, 0.047, 0.034, 0.025, 0.018, 0.016), 0.6),
    ),
}
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
CHILDREN = 8
# Seconds of host work outside the models: a step, a draft pass (measured on a slow core; they matter for small models).
STEP_SECONDS, PASS_SECONDS = 6e-4, 3e-4
CONTEXT = 128  # prefix length that passes are measured at
GRID = (1, 4, 8, 16, 32, 64)
BUDGET = 0.2  # seconds a measurement may take


class PassTimes:
    """Seconds of one pass of the target and of the draft by number of rows, measured when first asked for.

    A pass ends with the choice of its tokens. Before every one that is timed the target runs once: in a generation
    too, a pass of the draft finds the caches full of the target's weights.
    """

    def __init__(self, target: GPT2, draft: GPT2):
        self.target, self.draft = target, draft
        self._seconds: dict[tuple[bool, int, int, bool], float] = {}

    def target_pass(self, batch: int, nodes: int, sampled: bool) -> float:
        return self._interpolate(False, batch, nodes, sampled)

    def draft_pass(self, batch: int, nodes: int, sampled: bool) -> float:
        return self._interpolate(True, batch, nodes, sampled)

    def _interpolate(self, draft: bool, batch: int, nodes: int, sampled: bool) -> float:
        above = next((size for size in GRID if size >= nodes), GRID[-1])
        below = max((size for size in GRID if size <= nodes), default=above)
        low, high = self._measure(draft, batch, below, sampled), self._measure(draft, batch, above, sampled)
        if above == below:
            return high * max(1.0, nodes / above)
        return low + (high - low) * (nodes - below) / (above - below)

    def _measure(self, draft: bool, batch: int, nodes: int, sampled: bool) -> float:
        key = (draft, batch, nodes, sampled)
        if key not in self._seconds:
            before = _passes(self.target, False, batch, 1, False)
            self._seconds[key] = _median_time(_passes(self.draft if draft else self.target, *key), before)
        return self._seconds[key]


def _passes(model: GPT2, draft: bool, batch: int, nodes: int, sampled: bool) -> Callable[[], None]:
    """A function that runs one pass and waits for its result."""
    ops, device = model.ops, model.device
    context = min(CONTEXT, model.positions - 1)
    cache = Cache(model, batch, nodes, context)
    tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
    bias = torch.zeros(batch, 1, nodes, nodes + context, dtype=model.kv_dtype, device=device)
    inputs = ops.Batch(tokens, tokens + context, [], bias)
    noise = None
    if sampled:
        values = torch.zeros(batch, 1, model.vocab_size, device=device)
        noise = ops.NoiseAt(values, torch.zeros_like(tokens))
    warping = SAMPLED if sampled else None

    @torch.inference_mode()
    def run() -> None:
        logits = model.logits(model.forward(inputs, cache, 0))
        if draft:
            ops.choose_children(logits, min(CHILDREN, model.vocab_size), warping, noise)[0].tolist()
        else:
            ops.choose(logits, warping, noise).tolist()

    return run


def _median_time(run: Callable[[], None], before: Callable[[], None]) -> float:
    """Median of up to seven runs after a warm-up, each after `before`, or of as many as fit into BUDGET seconds."""
    run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 7 and (not times or time.perf_counter() - begin < BUDGET):
        before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@memoise
def expected_tokens(config: TreeConfig, sampled: bool) -> float:
    """Expected tokens of a step, the bonus token included: the mean over STRETCHES."""
    return sum(share * _expected(config, ranks, hit) for share, ranks, hit in STRETCHES[sampled])


def _expected(config: TreeConfig, ranks: tuple[float, ...], hit: float) -> float:
    """The same if every node's children were accepted independently, by rank."""
    ranks = ranks[: config.children]
    values: list[float] = []  # of every candidate
    waiting: list[tuple[float, int]] = []  # candidates not evaluated yet: (-value, depth)

    def evaluate(value: float, depth: int, guess: int) -> None:
        if depth >= config.depth:
            return
        for rank, rate in enumerate(ranks):
            child = value * rate
            values.append(child)
            if rank == 0 and guess > 0:
                # The guess is right with some probability; otherwise the child still waits.
                evaluate(child * hit, depth + 1, guess - 1)
                child *= 1 - hit
            heapq.heappush(waiting, (-child, depth + 1))

    for number in range(config.passes):
        count = min(config.width, len(waiting))
        wanted = [(-1.0, 0)] if number == 0 else [heapq.heappop(waiting) for _ in range(count)]
        for index, (value, depth) in enumerate(wanted):
            evaluate(-value, depth, config.prefetch if index < config.prefetch_width else 0)
    return 1.0 + sum(heapq.nlargest(config.nodes - 1, values))


def step_seconds(times: PassTimes, config: TreeConfig, batch: int, sampled: bool) -> float:
    """Predicted seconds of one step."""
    seconds = times.target_pass(batch, config.nodes, sampled) + STEP_SECONDS
    for number in range(config.passes):
        rows = (2 if number == 0 else config.width) + config.guesses
        seconds += times.draft_pass(batch, rows, sampled) + PASS_SECONDS
    return seconds


def best_tree(times: PassTimes, mode: str, batch: int, sampled: bool) -> TreeConfig:
    """The settings with the most expected tokens a second for this pair of models, mode, batch size and sampling."""
    candidates = []
    for nodes in (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64):
        if mode == "chain":
            candidates.append(TreeConfig(nodes, nodes - 1, nodes - 1, 1, 1, 0))
            continue
        for passes in (1, 2, 3, 4, 6):
            for width in (1, 2, 4):
                for prefetch in (1, 2, 4, 6) if mode == "staged" else (0,):
                    depth = min(nodes - 1, passes * (1 + prefetch))
                    if nodes - 1 <= CHILDREN * (1 + (passes - 1) * width) and (passes > 1 or width == 1):
                        candidates.append(TreeConfig(nodes, depth, passes, width, CHILDREN, prefetch, 1))

    def speed(config: TreeConfig) -> float:
        return expected_tokens(config, sampled) / step_seconds(times, config, batch, sampled)

    return max(candidates, key=speed)
