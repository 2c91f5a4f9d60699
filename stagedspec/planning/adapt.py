"""Trees that adapt to the text: each step of a generation uses one of a few levels, from no tree to the largest.

The controller sees what every step proposed, what was accepted and how long it took, and estimates for each level the
tokens and the seconds of a step. A batch is done when its last row is, so a step's gain is how much it shortens the
longest remaining row. Drafting stops where it does not pay: the target then decodes plainly. Now and then the draft
reads in one pass the tokens that were written without it, which shows how many of them it would have guessed.

Estimates can be wrong, so a running budget limits what drafting may lose against plain decoding: a few steps, a small
share of the plain steps made since, and a part of what drafting has won before. The next generation starts from what
this one has learned, budget included. So a hopeless draft, or one too slow for a batch of this size, costs next to
nothing. All this changes which nodes are verified, never the tokens.

Results may come late: a host that launches work on a GPU knows what a step did only after it has launched the next one.
So a step and a reading are each two calls, one when it is launched and one when its results are known.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from stagedspec.planning.cost import Model
from stagedspec.planning.tree import TreeConfig

OFF = TreeConfig().for_mode("autoregressive")
# Weights are counted in steps. A memory of 1 / (1 - KEEP) steps follows the text, and does not start at every miss.
KEEP = 0.9
PRIOR = 3.0  # of what was known before: the cost model's expectation, or what the last generation learned
LASTING = 0.98  # KEEP of what the next generation starts from
# Plain steps made in a row to learn what they take. The first of them comes after other work, and is not counted.
TRIAL = 3
# Drafted steps, over all generations, after which that is learned again, by how fast drafting seems beside plain
# decoding: where the gain is small an error could be larger. (at most so fast, drafted steps)
REFRESH = ((1.5, 32), (math.inf, 64))
TIMES = 9  # of the last steps whose median counts: what else the machine does makes some of them much longer
TELLS = 3  # drafted steps that the time of one reading counts as
READ = 0.25  # of one token that the draft has read
READS = 8.0  # at most, of one reading
RESUME = 1.05  # how fast a tree must seem, beside plain decoding, before drafting starts again
# Stop drafting when it recovers less than this fraction of its cost. Ten steps of sampled text say little, and
# dropping a useful draft costs more than keeping a slightly useless one.
LEAVE = 0.7
# Plain steps by which drafting and reading may fall behind plain decoding, and what each plain step adds to that; how
# much of what drafting has won may be lost again, because in a batch a few steps without gain for the slowest row are
# expensive; and how much more the first generation may lose, which knows nothing yet.
CREDIT, SHARE, WON, FIRST = 8.0, 0.02, 24.0, 6.0
# Times what a step should take: one that takes longer counts as if it had taken this long. Something else ran then.
ACCIDENT = 3.0
SMALLER = 1.15  # how much faster a smaller tree must seem than the largest
# Plain steps between two readings, longer each time that the draft fails. Also how many of the prompt's last tokens the
# draft is tested on: the largest that fits.
WAITS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Level:
    """One of the trees that a generation adapts between, and what the cost model expects of it.

    tokens, seconds: expected of a step. verify[n]: seconds of a step that verifies n nodes, drafting left out.
    first, later: seconds of its first and of every later draft pass. read: seconds in which the draft reads one more
    token of every row. name: for statistics.
    """

    name: str
    tree: TreeConfig
    tokens: float
    seconds: float
    verify: tuple[float, ...]
    first: float = 0.0
    later: float = 0.0
    read: float = 0.0

    @property
    def reach(self) -> int:
        """The longest path that the tree can hold."""
        return min(self.tree.depth, self.tree.nodes - 1)

    def cost(self, nodes: int, passes: int) -> float:
        """Seconds of a step with so many nodes and passes; a tree without floors always uses all of its own."""
        tree = self.tree
        nodes = min(nodes, tree.nodes) if tree.node_floor else tree.nodes
        passes = min(passes, tree.passes) if tree.pass_floor else tree.passes
        return self.verify[nodes] + (self.first + (passes - 1) * self.later if passes else 0.0)


def make_levels(model: Model, trees: Sequence[TreeConfig]) -> list[Level]:
    """Plain decoding and then `trees`, smallest first, as the cost model sees them."""
    verify = tuple(model.verify_seconds(max(1, nodes)) for nodes in range(1 + max(tree.nodes for tree in trees)))
    found = [Level("off", OFF, 1.0, verify[1], verify)]
    for index, tree in enumerate(trees):
        tokens, seconds = model.step(tree)
        first, later = (model.draft_seconds(tree, number) for number in (0, 1))
        name = ("small", "medium", "full")[index - len(trees)]
        found.append(Level(name, tree, tokens, seconds, verify, first, later, model.read_seconds()))
    return found


class _Mean:
    """A mean with exponential decay: a value of n steps ago has the weight keep**n."""

    def __init__(self, value: float, weight: float, keep: float = KEEP):
        self.total, self.weight, self.keep = value * weight, weight, keep

    @property
    def value(self) -> float:
        return self.total / self.weight

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = self.keep**weight
        self.total = self.total * kept + value * weight
        self.weight = self.weight * kept + weight


@dataclass
class _Known:
    """Measurements of a level in one generation: tokens and seconds of a step, and the number of steps made with it.

    lasting: the tokens again, with slower decay; the next generation's controller begins with them.
    """

    level: Level
    tokens: _Mean
    lasting: _Mean
    seconds: _Mean
    steps: int = 0

    @classmethod
    def of(cls, level: Level, last: "_Known | None") -> "_Known":
        """last: of the generation before, None for the first."""
        if last is None:
            tokens, weight, seconds = level.tokens, PRIOR, level.seconds
        else:
            tokens, weight, seconds = last.lasting.value, last.lasting.weight, last.seconds.value
        return cls(level, _Mean(tokens, PRIOR), _Mean(tokens, weight, LASTING), _Mean(seconds, PRIOR))

    def gained(self, tokens: float, weight: float = 1.0) -> None:
        self.tokens.add(tokens, weight)
        self.lasting.add(tokens, weight)


class Controller:
    """Chooses the level of every step of one generation; a batch has one.

    levels: of `make_levels`, plain decoding first. last: the controller of the generation before, None for the first.
    `begin` says whether the draft reads the prompts. Before a step, if `due`, the draft reads what it has missed
    (`catch_up`), and `read` takes what it would have proposed. The step has the tree of `level` (`launch`), and `step`
    takes its results. Results come in the order of the launches, at once or after later ones.
    """

    def __init__(self, levels: Sequence[Level], last: "Controller | None" = None):
        if last is not None and last.levels != list(levels):
            last = None  # the trees were chosen anew meanwhile
        before: Sequence[_Known | None] = [None] * len(levels) if last is None else last.known
        self.known: list[_Known] = [_Known.of(level, known) for level, known in zip(levels, before, strict=True)]
        # Seconds measured over seconds expected of the last plain steps; and how much larger that was for the last
        # steps that drafted. So a machine that gets slower while nothing is drafted says nothing about drafting.
        self.pace: deque[float] = deque(() if last is None else last.pace, TIMES)
        self.slower: deque[float] = deque([1.0] if last is None else last.slower, TIMES)
        self._drafted: int = 0 if last is None else last._drafted  # steps since the last plain one
        self._drafts: bool | None = None  # whether the last step drafted
        self.onward = _Mean(0.5, PRIOR)  # probability that an accepted path goes on by one more node
        self._left = math.inf  # tokens to write, drafted ones not counted
        self.missed = 0  # tokens of each row that the draft has not read
        self.unread = 0  # tokens of the longest prompt, while the draft has read none of it
        self.trial = TRIAL if last is None else 0  # plain steps that are to be made now, whatever pays
        self.credit: float = CREDIT if last is None else max(0.0, last.credit)  # plain steps
        self._floor = -FIRST if last is None else 0.0
        self.chosen: int = 0 if last is None else last.chosen
        self._since = 0
        self._wait: int = 0 if last is None else last._wait
        self._choose()

    @property
    def levels(self) -> list[Level]:
        return [known.level for known in self.known]

    def begin(self, prompt: int, new_tokens: int) -> bool:
        """Whether the draft is to read the prompts before the first step: where drafting pays, and enough is left to
        write. prompt: tokens of the longest."""
        self._left, cost = new_tokens, self._reading(prompt)
        if cost >= min(self.credit, new_tokens * (1 - self.rate(0) / self.rate(self.chosen))):
            self.chosen = 0
        self.unread = 0 if self.chosen else prompt
        if self.chosen:
            self._account(-cost)
        return self.chosen > 0

    def _reading(self, count: int) -> float:
        """The time that the draft takes to read so many tokens of every row, in plain steps.

        While nothing is drafted at the expected price: what drafted steps took may be of a moment that is over.
        """
        return self._price(count) * self._pace(self.chosen > 0) / self._takes(0)

    def _price(self, count: int) -> float:
        """The expected seconds of such a reading."""
        level = self.known[-1].level
        return level.first + count * level.read

    @property
    def level(self) -> Level:
        return self.known[self._next].level

    @property
    def _next(self) -> int:
        return 0 if self.trial else self.chosen

    @property
    def made(self) -> dict[str, int]:
        """Steps made with each level, by name."""
        return {known.level.name: known.steps for known in self.known}

    @property
    def due(self) -> bool:
        """Whether the draft should read before this step."""
        if not self.missed or self.trial:
            return False
        # What was saved may go into a long prompt, where enough is left to write: it would never be read otherwise.
        most = min(self.credit, self._left / 2) if self.credit >= CREDIT else self.credit / 4
        affordable = self._reading(self.unread + self.missed) <= most
        return self.chosen > 0 or (affordable and self.missed >= WAITS[self._wait])

    def rate(self, index: int) -> float:
        """Expected tokens a second of each row with a level."""
        return self.known[index].tokens.value / self._takes(index)

    def _takes(self, index: int) -> float:
        """Expected seconds of a step with a level."""
        return self.known[index].seconds.value * self._pace(index > 0)

    def _pace(self, drafts: bool) -> float:
        """The ratio of measured to expected seconds of such steps."""
        plain = median_low(self.pace) if self.pace else 1.0
        return plain * median_low(self.slower) if drafts else plain

    def catch_up(self) -> None:
        """Notes that the draft now reads all that it has missed."""
        if not self.chosen:
            self._account(-self._reading(self.unread + self.missed))
        self.missed = self.unread = 0

    def read(self, rows: Sequence[Sequence[tuple[int, float]]], tokens: int = 0, seconds: float | None = None) -> None:
        """Takes the draft's ranks of tokens written without it. In a batch the mean over all rows counts: a few tokens
        do not say which row will be done last, and the worst of them would be an accident.

        rows: for each row that is running, of each token in turn: its rank among the draft's children, -1 for none, and
        the log-probability that the draft gave it. tokens: how many of each row were read in so many seconds, None for
        the expected ones.
        """
        if seconds is not None and not self.chosen:
            # Nothing else shows, while nothing is drafted, whether that is still as slow as it was.
            pace = seconds / (self._price(tokens) * self._pace(False))
            self._account(-max(0.0, min(pace, ACCIDENT) - 1.0) * self._reading(tokens))
            self.slower.extend([max(1.0, pace)] * TELLS)
        rows = [row for row in rows if row]
        count = sum(map(len, rows))
        if not count:
            return
        weight = min(READS, READ * count / len(rows))
        onward = sum(rank >= 0 for row in rows for rank, _ in row) / count
        self.onward.add(onward, weight)
        for known in self.known[1:]:
            level = known.level
            known.gained(1.0 + _mean_path(level.tree, level.reach, rows, onward), weight)
        if self.chosen == 0:
            self._wait = min(self._wait + 1, len(WAITS) - 1)
        self._choose()

    def launch(self) -> int:
        """Notes that a step with the tree of `level` begins. Returns the level's index, for `step`."""
        made = self._next
        self.known[made].steps += 1
        self._since += 1
        if made:
            self._drafted += 1
        else:
            self.missed, self._left = self.missed + 1, self._left - 1
            self.trial, self._drafted = max(0, self.trial - 1), 0
        return made

    def step(
        self,
        made: int,
        nodes: int,
        passes: int,
        accepted: Sequence[int],
        depths: Sequence[int],
        left: Sequence[int] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Takes the result of a step and chooses the next level.

        made: of `launch`. nodes, passes: nodes verified and draft passes run. Of each row: accepted, tokens taken from
        nodes below the root, -1 for a row that had stopped; depths, the depth of its deepest node; left, tokens to
        write before the step, None if all rows have the same number. seconds: duration of the step, None for the
        expected one.
        """
        level = self.known[made].level
        drafts = made > 0
        # The first of its kind comes on cold caches, and says something only where little is known.
        if seconds is not None and (self._drafts == drafts or (drafts and len(self.slower) < 3)):
            pace = seconds / level.cost(nodes, passes)
            if drafts:
                self.slower.append(pace / self._pace(False))
            else:
                self.pace.append(pace)
        self._drafts = drafts
        if not drafts:
            self._account(SHARE, min(max(CREDIT, self._reading(self.unread + self.missed)), 4 * CREDIT))
            return
        faster = self.rate(made) / self.rate(0)
        if self._drafted >= next(steps for bound, steps in REFRESH if faster <= bound):
            self.trial = TRIAL
        rows = zip(accepted, depths, left or [0] * len(depths), strict=True)
        running = [(taken, depth, more) for taken, depth, more in rows if taken >= 0]
        if not running:
            return
        tree = level.tree
        total = sum(taken for taken, _, _ in running)
        tried = sum(taken + (taken < depth) for taken, depth, _ in running)
        if tried:
            self.onward.add(total / tried)
        # Whether this level was too small to show what a larger one would have brought.
        bound = nodes >= tree.nodes or passes >= tree.passes
        deepest, most = max(depth for _, depth, _ in running), max(more for _, _, more in running)
        likely = level.cost(nodes, passes) * self._pace(True)
        took = likely if seconds is None else min(seconds, ACCIDENT * likely)
        self._account(1.0 + most - max(more - taken for taken, _, more in running) - took / self._takes(0))
        for index, known in enumerate(self.known[1:], 1):
            level = known.level
            # A tree grows at an even pace: with fewer passes it is as much shallower.
            pace = min(1.0, level.tree.passes / passes)
            still, further = [], 0.0
            for taken, depth, more in running:
                gained = min(taken, level.reach, depth * pace)
                if bound and index > made and taken >= depth:
                    beyond = _geometric(self.onward.value, level.reach - taken)
                    gained, further = gained + beyond, max(further, beyond)
                still.append(more - gained)
            grown = (deepest + further) / deepest if deepest else 1.0
            known.gained(1.0 + most - max(still))
            known.seconds.add(level.cost(round(1 + (nodes - 1) * pace * grown), math.ceil(passes * grown)))
        self._choose()

    def _account(self, won: float, most: float = WON) -> None:
        """Adds plain steps that were won (or lost, below 0) to the budget, which grows up to `most`."""
        self.credit = min(max(most, self.credit), self.credit + won)

    def _pays(self, index: int) -> bool:
        """Whether the level's tokens beyond the first are worth their time, or nearly so."""
        bought, spent = self.known[index].tokens.value - 1.0, self._takes(index) / self._takes(0) - 1.0
        return bought > LEAVE * spent

    def _choose(self) -> None:
        rates = [self.rate(index) for index in range(len(self.known))]
        best, last = max(range(1, len(rates)), key=rates.__getitem__), len(rates) - 1
        # What other levels would have brought is a guess, and floors keep the largest small where that pays.
        if rates[best] < rates[last] * SMALLER:
            best = last
        if self.credit < self._floor or not (self._pays(best) if self.chosen else rates[best] > rates[0] * RESUME):
            best = 0
        if (best == 0) != (self.chosen == 0):
            # Drafting that did not last is no reason to try again soon.
            if best == 0 and self._since > WAITS[self._wait]:
                self._wait = 0
            self._since = 0
        self.chosen = best


def _geometric(rate: float, count: int) -> float:
    """Expected further nodes of a path that goes on with probability `rate`, at most `count` times."""
    if count <= 0:
        return 0.0
    return float(count) if rate >= 1.0 else rate * (1.0 - rate**count) / (1.0 - rate)


def _mean_path(tree: TreeConfig, reach: int, rows: Sequence[Sequence[tuple[int, float]]], onward: float) -> float:
    """The mean number of nodes that a tree grown at each of the written tokens would have had accepted.

    A node counts as part of the tree if its path is probable enough for a tree of this size and not below its floor.
    """
    floor = math.log(max(tree.node_floor, 0.25 / tree.nodes))
    total, count = 0.0, 0
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
