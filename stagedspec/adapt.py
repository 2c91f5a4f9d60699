"""Trees that follow the text: a generation climbs a short ladder of trees, from none at all to the largest.

The controller sees what every step proposed and what was accepted, and estimates for each rung the tokens and, from
measured pass times, the seconds of a step. Where drafting does not pay it stops: the target then decodes plainly, and
now and then the draft reads what was written without it, all in one pass, which shows how much of it it would have
guessed. So a hopeless draft costs next to nothing. All this changes which nodes are verified, never the tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stagedspec.cost import Model
from stagedspec.tree import TreeConfig

OFF = TreeConfig().for_mode("autoregressive")
# Weights are counted in steps. A memory of 1 / (1 - KEEP) steps follows the text, and does not start at every miss.
KEEP = 0.9
PRIOR = 3.0  # of the cost model's expectation
READ = 0.25  # of one token that the draft has read
READS = 8.0  # at most, of one reading
RESUME = 1.05  # how fast a tree must seem, beside plain decoding, before drafting starts again
# The share of its own time that drafting must bring back, or else it ends. Ten steps of sampled text say little, and to
# leave a draft that pays costs more than to keep one that just does not.
LEAVE = 0.5
SMALLER = 1.15  # how much faster a smaller tree must seem than the largest
WAITS = (4, 8, 16, 32)  # plain steps between two readings, longer each time that the draft fails; the first goes for
# the prompt's end too, backwards


@dataclass(frozen=True)
class Rung:
    """One tree of the ladder, and what the cost model knows of it.

    tokens, seconds: expected of a step. verify[n]: seconds of a step that verifies n nodes, drafting left out.
    first, later: seconds of its first and of every later draft pass. name: for statistics.
    """

    name: str
    tree: TreeConfig
    tokens: float
    seconds: float
    verify: tuple[float, ...]
    first: float = 0.0
    later: float = 0.0

    @property
    def reach(self) -> int:
        """The longest path that the tree can hold."""
        return min(self.tree.depth, self.tree.nodes - 1)

    def cost(self, nodes: int, passes: int) -> float:
        """Seconds of a step that needed as many; a tree without floors always takes all."""
        tree = self.tree
        nodes = min(nodes, tree.nodes) if tree.node_floor else tree.nodes
        passes = min(passes, tree.passes) if tree.pass_floor else tree.passes
        return self.verify[nodes] + (self.first + (passes - 1) * self.later if passes else 0.0)


def rungs(model: Model, trees: Sequence[TreeConfig]) -> list[Rung]:
    """Plain decoding and then `trees`, smallest first, as the cost model sees them."""
    verify = tuple(model.verify_seconds(max(1, nodes)) for nodes in range(1 + max(tree.nodes for tree in trees)))
    found = [Rung("off", OFF, 1.0, verify[1], verify)]
    for index, tree in enumerate(trees):
        draft = [model.draft_seconds(tree, number) for number in (0, 1)]
        name = ("small", "medium", "full")[index - len(trees)]
        found.append(Rung(name, tree, *model.step(tree), verify, *draft))
    return found


class _Mean:
    """A mean that forgets: what came n steps ago counts KEEP**n."""

    def __init__(self, value: float, weight: float):
        self.total, self.weight = value * weight, weight

    @property
    def value(self) -> float:
        return self.total / self.weight

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = KEEP**weight
        self.total = self.total * kept + value * weight
        self.weight = self.weight * kept + weight


class Controller:
    """Chooses the rung of every step of one generation; a batch has one.

    ladder: of `rungs`, plain decoding first. A step goes: if `due`, the draft reads what it has missed and `read` is
    told; then the step is made with the tree of `rung`, and `step` is told.
    """

    def __init__(self, ladder: Sequence[Rung]):
        self.ladder = list(ladder)
        self.tokens = [_Mean(rung.tokens, PRIOR) for rung in ladder]
        self.seconds = [_Mean(rung.seconds, PRIOR) for rung in ladder]
        self.onward = _Mean(0.5, PRIOR)  # how often a walk along the tree goes on by one more node
        self.missed = 0  # tokens of each row that the draft has not read
        self.steps = [0] * len(self.ladder)  # made, of each rung
        self.chosen, self._wait, self._since = 0, 0, 0
        self._choose()

    @property
    def rung(self) -> Rung:
        return self.ladder[self.chosen]

    @property
    def made(self) -> dict[str, int]:
        """Steps made with each rung, by name."""
        return {rung.name: steps for rung, steps in zip(self.ladder, self.steps, strict=True)}

    @property
    def due(self) -> bool:
        """Whether the draft should read before this step."""
        return self.missed > 0 and self.missed >= WAITS[self._wait]

    def rate(self, index: int) -> float:
        """Tokens a second of each row that the rung promises."""
        return self.tokens[index].value / self.seconds[index].value

    def read(self, rows: Sequence[Sequence[tuple[int, float]]]) -> None:
        """What the draft made of tokens written without it.

        rows: for each row that is running, of each token in turn: its rank among the draft's children, -1 for none, and
        the log-probability that the draft gave it.
        """
        self.missed = 0
        rows = [row for row in rows if row]
        count = sum(map(len, rows))
        if not count:
            return
        weight = min(READS, READ * count / len(rows))
        known = sum(rank >= 0 for row in rows for rank, _ in row) / count
        self.onward.add(known, weight)
        for index, rung in enumerate(self.ladder[1:], 1):
            self.tokens[index].add(1.0 + _walks(rung.tree, rung.reach, rows, known), weight)
        if self.chosen == 0:
            self._wait = min(self._wait + 1, len(WAITS) - 1)
        self._choose()

    def step(self, nodes: int, passes: int, accepted: Sequence[int], depths: Sequence[int]) -> None:
        """What a step took and brought.

        nodes, passes: that were run. Of each row: accepted, tokens taken from nodes below the root, -1 for a row that
        had stopped; depths, of its deepest node.
        """
        self.steps[self.chosen] += 1
        self._since += 1
        if self.chosen == 0:
            self.missed += 1
            return
        walks = [(taken, depth) for taken, depth in zip(accepted, depths, strict=True) if taken >= 0]
        if not walks:
            return
        tree = self.rung.tree
        taken = sum(taken for taken, _ in walks)
        tried = sum(taken + (taken < depth) for taken, depth in walks)
        if tried:
            self.onward.add(taken / tried)
        # Whether this rung was too small to show what a larger one would have brought.
        bound = nodes >= tree.nodes or passes >= tree.passes
        deepest = max(depth for _, depth in walks)
        for index, rung in enumerate(self.ladder[1:], 1):
            # A tree grows at an even pace: with fewer passes it is as much shallower.
            pace = min(1.0, rung.tree.passes / passes)
            total = further = 0.0
            for taken, depth in walks:
                total += min(taken, rung.reach, depth * pace)
                if bound and index > self.chosen and taken >= depth:
                    more = _geometric(self.onward.value, rung.reach - taken)
                    total, further = total + more, max(further, more)
            grown = (deepest + further) / deepest if deepest else 1.0
            self.tokens[index].add(1.0 + total / len(walks))
            self.seconds[index].add(rung.cost(round(1 + (nodes - 1) * pace * grown), math.ceil(passes * grown)))
        self._choose()

    def _pays(self, index: int) -> bool:
        """Whether the rung's tokens beyond the first are worth their time, or nearly so."""
        bought, spent = self.tokens[index].value - 1.0, self.seconds[index].value / self.seconds[0].value - 1.0
        return bought > LEAVE * spent

    def _choose(self) -> None:
        rates = [self.rate(index) for index in range(len(self.ladder))]
        best, last = max(range(1, len(rates)), key=rates.__getitem__), len(rates) - 1
        # What other rungs would have brought is a guess, and floors keep the largest small where that pays.
        if rates[best] < rates[last] * SMALLER:
            best = last
        if not (self._pays(best) if self.chosen else rates[best] > rates[0] * RESUME):
            best = 0
        if (best == 0) != (self.chosen == 0):
            # A stretch of drafting that did not last is no reason to hope again soon.
            if best == 0 and self._since > WAITS[self._wait]:
                self._wait = 0
            self._since = 0
        self.chosen = best


def _geometric(rate: float, count: int) -> float:
    """Expected further nodes of a walk that goes on with probability `rate`, at most `count` times."""
    if count <= 0:
        return 0.0
    return float(count) if rate >= 1.0 else rate * (1.0 - rate**count) / (1.0 - rate)


def _walks(tree: TreeConfig, reach: int, rows: Sequence[Sequence[tuple[int, float]]], onward: float) -> float:
    """The mean number of nodes that walks along the tokens that were written would have taken, one from each token.

    A node is in the tree if its path is likely enough for one of so few nodes, and not under the floor.
    """
    floor = math.log(max(tree.node_floor, 0.25 / tree.nodes))
    total = count = 0
    for row in rows:
        for start in range(len(row)):
            score, taken = 0.0, 0
            while taken < reach:
                if start + taken == len(row):
                    total += _geometric(onward, reach - taken)
                    break
                rank, logprob = row[start + taken]
                score += logprob
                if not 0 <= rank < min(tree.children, tree.nodes - 1 - taken) or score < floor:
                    break
                taken += 1
            total += taken
            count += 1
    return total / count
