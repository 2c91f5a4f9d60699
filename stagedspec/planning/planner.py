"""Chooses the token tree of every call."""

import copy
import logging
import math
from threading import Lock
from typing import NamedTuple, cast

from stagedspec.devices import current_device
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.model_set import Models
from stagedspec.planning import cost
from stagedspec.planning.adapt import Controller, Level, make_levels
from stagedspec.planning.profile import Tuning, keep, pair_of, recall
from stagedspec.planning.tree import MODES, TreeConfig

log = logging.getLogger("stagedspec")


class Plan(NamedTuple):
    """Trees of one generation.

    tree: the largest one. levels: all that it adapts between, plain decoding first; empty where every step has `tree`.
    """

    tree: TreeConfig
    levels: tuple[Level, ...] = ()


class TreePlanner:
    """Chooses trees: the call's own, else the decoder's fixed one, else what the cost model expects to be fastest.

    The cost model uses the times of model passes and how often the draft is right. Both come from a tuning's file, from
    what an earlier process on this machine measured, or are measured when a tree is first needed.

    models: replaced by the decoder when weights change. fixed: the decoder's own tree, or None.
    """

    def __init__(self, models: Models, fixed: TreeConfig | None = None):
        self._models, self.fixed = models, fixed
        self._tuning: Tuning | None = None  # read from the user's cache when a tree is first chosen
        self._own = True  # whether measurements are kept in the user's cache; not with a tuning that was given
        self._remeasured = False
        self._costs: cost.PassTimes | None = None
        self._chosen: dict[tuple[str, int, bool], tuple[Level, ...]] = {}  # by mode, batch, sampled
        self._controllers: dict[tuple[str, int, bool], Controller] = {}  # of the last generation of each kind
        self._measuring = Lock()  # two threads' measurements would disturb each other

    def copy(self) -> "TreePlanner":
        """One with the same settings and measurements, which learns for itself."""
        made = TreePlanner(self._models, self.fixed)
        made._tuning, made._own = copy.deepcopy(self._tuning), self._own
        return made

    def use(self, tuning: Tuning, source: str) -> None:
        """Chooses by this tuning from now on. Raises ValueError, naming source, if it is for other models."""
        tuning.check(self._models, source)
        self._tuning, self._own = tuning, False
        self._forget()

    def follow(self, models: Models) -> None:
        """Takes models of the same shapes with new weights; their passes take as long as before."""
        self._models = models
        if self._costs is not None and models.draft is not None:
            self._costs = cost.PassTimes(models.target, models.draft, self._costs.seconds)

    def tree_for(
        self, mode: str, batch: int = 1, tree: TreeConfig | None = None, do_sample: bool = False
    ) -> TreeConfig:
        """The tree of a call with these arguments, the largest one where trees adapt. Raises ValueError for a mode
        that is unknown or needs a draft, and for a tree that the backend cannot grow."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if tree is not None and not isinstance(tree, TreeConfig):
            raise ValueError(f"tree must be a TreeConfig or None, got {type(tree).__name__}")
        if mode == "autoregressive":
            return TreeConfig().for_mode(mode)
        models, chosen = self._models, tree or self.fixed
        if models.draft is None:
            raise ValueError(
                f"mode {mode!r} needs a draft model: give draft=... (--draft), or use mode='autoregressive' "
                "(--mode autoregressive) or prompt_lookup_num_tokens=..., which proposes what the sequence itself "
                "repeats"
            )
        if chosen is None:
            return self._levels(mode, batch, do_sample)[-1].tree
        chosen = chosen.for_mode(mode)
        models.target.ops.check_tree(chosen, models.ngram)
        return chosen

    def plan(self, mode: str, batch: int = 1, tree: TreeConfig | None = None, do_sample: bool = False) -> Plan:
        """The trees of a generation with these arguments; raises as `tree_for`."""
        largest = self.tree_for(mode, batch, tree, do_sample)
        if not largest.passes or tree or self.fixed or not self._models.target.ops.adapts_trees:
            return Plan(largest)
        return Plan(largest, self._levels(mode, batch, do_sample))

    def controller(self, mode: str, batch: int, do_sample: bool, levels: tuple[Level, ...]) -> Controller | None:
        """What adapts a new generation's trees between the levels of its `Plan`; None where there are none.

        It starts from what the last generation of this kind has learned, as the next one will from this.
        """
        if not levels:
            return None
        key = mode, batch, do_sample
        made = self._controllers[key] = Controller(levels, self._controllers.get(key))
        return made

    def _levels(self, mode: str, batch: int, do_sample: bool) -> tuple[Level, ...]:
        """Trees to adapt between, plain decoding first, the cost model's best one last."""
        key = mode, batch, do_sample
        with self._measuring:
            if key not in self._chosen:
                self._chosen[key] = self._choose(*key)
            return self._chosen[key]  # inside: `reconsider` in another thread may forget it

    def _choose(self, mode: str, batch: int, do_sample: bool) -> tuple[Level, ...]:
        """Asks the cost model, and measures the passes that it does not know yet."""
        models, key = self._models, (mode, batch, do_sample)
        ops = models.target.ops
        tuning = self._tuning = self._tuning or recall(models)
        costs = self._costs = self._costs or cost.PassTimes(models.target, cast(GPT2, models.draft), tuning.seconds)
        model = cost.Model(costs, batch, do_sample, tuning.profiles_for(do_sample), ops)
        trees = tuning.trees.get(key)
        with ops.lock, current_device(models.device):
            try:
                if not costs.knows(batch, do_sample):
                    log.warning(
                        "measuring model passes to choose token trees (%s, batch %d): a few seconds, kept for later",
                        "sampled" if do_sample else "greedy",
                        batch,
                    )
                if trees is None:
                    costs.prepare(batch, do_sample)
                    trees = tuning.trees[key] = model.levels(mode)
                for tree in trees:
                    ops.check_tree(tree, models.ngram)
                found = tuple(make_levels(model, trees))
            finally:
                costs.release()
        if self._own and costs.seconds != tuning.seconds:
            tuning.seconds = dict(costs.seconds)
            keep(models, tuning)
        return found

    def reconsider(self, do_sample: bool, steps: int, target_seconds: float | None) -> None:
        """Forgets the measured pass times if this generation of batch 1 shows that the machine was busy when they were
        measured: its target passes took less than half of the shortest one. At most once; the next call measures again.

        steps, target_seconds: of the generation. On a CPU alone: on a GPU phases are timed when they are launched.
        """
        costs = self._costs
        if self._remeasured or not self._own or costs is None or self._models.device.type != "cpu" or steps < 4:
            return
        shortest = costs.seconds.get((False, 1, 1, do_sample), 0.0)
        if (math.inf if target_seconds is None else target_seconds) / steps < shortest / 2:
            log.info("token trees were chosen while this machine was busy: the next call measures passes again")
            with self._measuring:
                self._remeasured, self._tuning = True, Tuning(pair_of(self._models))
                self._forget()

    def _forget(self) -> None:
        self._costs = None
        self._chosen.clear()
        self._controllers.clear()
