"""Token trees: their settings."""

from dataclasses import dataclass, replace

from stagedspec.values import at_least, real, truth

MODES = ("autoregressive", "chain", "tree", "staged")


@dataclass(frozen=True)
class TreeConfig:
    """Limits of one step's tree, and the least acceptance probabilities of a node and of a pass.

    nodes: N, the nodes the target verifies, root included.
    depth: the longest path below the root.
    passes: draft passes a step. width: nodes a pass evaluates because they score best.
    children: the candidates kept of every evaluated node.
    prefetch: levels that draft² guesses below the nodes of a pass; prefetch_width: guesses a level. context: whether it
    also guesses what followed the same two tokens before in the sequence; otherwise from its table alone.
    node_floor: the least probability, by the draft, that a node's path is accepted; less likely ones stay out.
    pass_floor: the least such probability of the best node that one more pass would evaluate; else no pass is run.
    With floors of 0 every step has the same shape.

    Raises ValueError for settings that cannot be.
    """

    nodes: int = 12
    depth: int = 6
    passes: int = 3
    width: int = 2
    children: int = 4
    prefetch: int = 1
    prefetch_width: int = 2
    node_floor: float = 0.0
    pass_floor: float = 0.0
    context: bool = True

    def __post_init__(self) -> None:
        low = {"nodes": 1, "depth": 0, "passes": 0, "width": 1, "children": 1, "prefetch": 0, "prefetch_width": 1}
        for name, least in low.items():
            object.__setattr__(self, name, at_least(f"tree {name}", getattr(self, name), least))
        for name in ("node_floor", "pass_floor"):
            value = real(getattr(self, name))
            if value is None or not 0 <= value < 1:
                raise ValueError(f"tree {name} must be a probability in [0, 1), got {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "context", truth("tree context", self.context))
        if self.nodes > 256:
            raise ValueError(f"tree nodes must be at most 256, got {self.nodes}")
        if self.depth > 256 or self.slots > 1024:
            raise ValueError(
                "a tree may be at most 256 deep and take at most 1024 draft evaluations a step, "
                f"got depth {self.depth} and {self.slots} evaluations"
            )
        if self.nodes > 1 and (self.passes == 0 or self.depth == 0):
            raise ValueError(
                f"a tree of {self.nodes} nodes needs at least one draft pass and a depth of 1, got {self.passes} "
                f"passes and depth {self.depth}"
            )
        if self.nodes - 1 > self.evaluations * self.children:
            raise ValueError(
                f"{self.passes} passes of width {self.width} with {self.children} children each propose at most "
                f"{self.evaluations * self.children} nodes, fewer than nodes - 1 = {self.nodes - 1}; "
                "lower nodes, or raise one of the others"
            )

    @property
    def evaluations(self) -> int:
        """Nodes that the draft evaluates for certain: the root, then `width` a pass."""
        return 1 + (self.passes - 1) * self.width if self.passes else 0

    @property
    def guesses(self) -> int:
        """Draft²'s guesses a pass."""
        return self.prefetch * self.prefetch_width

    @property
    def slots(self) -> int:
        """Rows of the draft's tree region: the catch-up token, the root, and every evaluation."""
        if not self.passes:
            return 0
        return 2 + (self.passes - 1) * self.width + self.passes * self.guesses

    def for_mode(self, mode: str) -> "TreeConfig":
        """The settings of a mode: one code path, different shapes.

        Raises ValueError for an unknown mode.
        """
        if mode == "autoregressive":
            return TreeConfig(nodes=1, depth=0, passes=0, children=1, prefetch=0)
        if mode == "chain":
            depth = max(1, min(self.depth, self.nodes - 1))
            return replace(
                self, nodes=depth + 1, depth=depth, passes=depth, width=1, children=1, prefetch=0, prefetch_width=2
            )
        if mode == "tree":
            return replace(self, prefetch=0)
        if mode == "staged":
            return self
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
