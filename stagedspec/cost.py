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

# Acceptance of the draft's first, second, ... child. Measured values of the embedded trio are close to these.
RANKS = (0.66, 0.12, 0.05, 0.03)
# How often draft² names the child the draft will want next.
PREFETCH_HIT = 0.45
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
def expected_tokens(config: TreeConfig) -> float:
    """Expected tokens of a step, the bonus token included, if ranks were accepted independently at RANKS."""
    ranks = (*RANKS, *(RANKS[-1] * 0.5**i for i in range(1, config.children)))[: config.children]
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
                evaluate(child * PREFETCH_HIT, depth + 1, guess - 1)
                child *= 1 - PREFETCH_HIT
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


def best_tree(times: PassTimes, mode: str, batch: int) -> TreeConfig:
    """The settings with the most expected tokens a second for this pair of models, mode and batch size."""
    candidates = []
    for nodes in (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64):
        for passes in range(1, 8):
            for width in (1, 2, 4):
                for prefetch in (0, 1, 2) if mode == "staged" else (0,):
                    depth = min(nodes - 1, passes * (1 + prefetch))
                    if mode == "chain":
                        if width > 1 or passes != nodes - 1:
                            continue
                        candidates.append(TreeConfig(nodes, passes, passes, 1, 1, 0))
                    elif nodes - 1 <= 4 * (1 + (passes - 1) * width) and (prefetch or mode != "staged"):
                        candidates.append(TreeConfig(nodes, depth, passes, width, 4, prefetch, 2))
    return max(candidates, key=lambda config: expected_tokens(config) / step_seconds(times, config, batch))
