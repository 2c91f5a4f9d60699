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

# How often the target takes the draft's first, second, ... child, greedy and sampled (top-k 50, T=1, shared noise), and
# how often draft² names the draft's first child. Measured with the embedded trio on the first 32 of
# bench/prompts.jsonl, 96 new tokens each: a prior for the shape of the tree, not a result.
RANKS = {
    False: (0.54, 0.15, 0.07, 0.04, 0.026, 0.014, 0.008, 0.008),
    True: (0.41, 0.15, 0.07, 0.045, 0.029, 0.02, 0.012, 0.012),
}
PREFETCH_HIT = {False: 0.54, True: 0.15}
CHILDREN = 8
# Seconds of host work outside the models: a step, a draft pass (measured on a slow core; they matter for small models).
STEP_SECONDS, PASS_SECONDS = 6e-4, 3e-4
CONTEXT = 128  # prefix length that passes are measured at
GRID = (1, 4, 8, 16, 32, 64)
BUDGET = 0.2  # seconds a measurement may take


class PassTimes:
    """Seconds of one pass of the target and of the draft by number of rows, measured when first asked for."""

    def __init__(self, target: GPT2, draft: GPT2):
        self.target, self.draft = target, draft
        self._seconds: dict[tuple[bool, int, int], float] = {}

    def target_pass(self, batch: int, nodes: int) -> float:
        return self._interpolate(False, batch, nodes)

    def draft_pass(self, batch: int, nodes: int) -> float:
        return self._interpolate(True, batch, nodes)

    def _interpolate(self, draft: bool, batch: int, nodes: int) -> float:
        above = next((size for size in GRID if size >= nodes), GRID[-1])
        below = max((size for size in GRID if size <= nodes), default=above)
        low, high = self._measure(draft, batch, below), self._measure(draft, batch, above)
        if above == below:
            return high * max(1.0, nodes / above)
        return low + (high - low) * (nodes - below) / (above - below)

    @torch.inference_mode()
    def _measure(self, draft: bool, batch: int, nodes: int) -> float:
        key = (draft, batch, nodes)
        if key not in self._seconds:
            model = self.draft if draft else self.target
            ops, device = model.ops, model.device
            context = min(CONTEXT, model.positions - 1)
            cache = Cache(model, batch, nodes, context)
            tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
            bias = torch.zeros(batch, 1, nodes, nodes + context, dtype=model.dtype, device=device)
            inputs = ops.Batch(tokens, tokens + context, [], bias)

            def run() -> None:
                # Reading the result waits for the device.
                model.logits(model.forward(inputs, cache, 0)).argmax(-1).tolist()

            self._seconds[key] = _median_time(run)
        return self._seconds[key]


def _median_time(run: Callable[[], None]) -> float:
    """Median of up to seven runs after a warm-up, or of as many as fit into BUDGET seconds."""
    run()
    times: list[float] = []
    while len(times) < 7 and (not times or sum(times) < BUDGET):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@memoise
def expected_tokens(config: TreeConfig, sampled: bool) -> float:
    """Expected tokens of a step, the bonus token included, if ranks were accepted independently at RANKS."""
    ranks, hit = RANKS[sampled][: config.children], PREFETCH_HIT[sampled]
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


def step_seconds(times: PassTimes, config: TreeConfig, batch: int) -> float:
    """Predicted seconds of one step."""
    seconds = times.target_pass(batch, config.nodes) + STEP_SECONDS
    for number in range(config.passes):
        rows = (2 if number == 0 else config.width) + config.guesses
        seconds += times.draft_pass(batch, rows) + PASS_SECONDS
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
                for prefetch in (1, 2, 4) if mode == "staged" else (0,):
                    depth = min(nodes - 1, passes * (1 + prefetch))
                    if nodes - 1 <= CHILDREN * (1 + (passes - 1) * width) and (passes > 1 or width == 1):
                        candidates.append(TreeConfig(nodes, depth, passes, width, CHILDREN, prefetch, 1))
    return max(candidates, key=lambda config: expected_tokens(config, sampled) / step_seconds(times, config, batch))
