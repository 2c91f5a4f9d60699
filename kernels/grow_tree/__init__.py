"""Growing a step's trees on the device: best-first selection, draft²'s guesses, and the finished trees.

`host_growth.Growth` in two kernels. One CTA holds one sequence; nothing is read back and nothing is allocated.

    grow_pass     records what the draft proposed for the last pass, then chooses the slots of the next: the best
                  `width` candidates that no slot evaluates, and below them `prefetch` levels of draft²'s
                  `prefetch_width` best guesses; writes the inputs of the draft's pass over them
    harvest_tree  records the last pass; the best nodes - 1 candidates become the tree; writes the target's inputs

Words as in state/host.py: a slot is a row that the draft evaluates (0 the catch-up token, 1 the root), a candidate a
child that an evaluated slot proposed. Candidate c of slot s has the index s * children + c: its parent needs no field.

State, for L slots, C children and W = ceil(L / 32) mask words (`GrowthState`):

    slots            int32 [5, B, L]   token, previous token, depth, parent (of a guess, else -1), candidate
    slot_masks       int32 [B, L, W]   the slots on the path to each slot, itself included
    slot_scores      fp32  [B, L]      log-probability of its path by the draft, -inf for a guess not confirmed
    candidates       int32 [3, B, L*C] token, slot that evaluates it (-1: none), node of the finished tree
    candidate_scores fp32  [B, L*C]    -inf: no candidate

The inputs of a model's pass over N rows: batch int32 [3, B, N] (token, position, position of the noise), masks
[B, N, words] and prefix [B], the committed rows that the pass sees. The tree: tree int32 [5, B, N] (token, parent,
depth, slot, origin); nodes that a row's tree lacks have the parent -1 and see the root alone.

A kernel is compiled for tile sizes alone. It takes the other settings of a tree at run time, and none of its loops over
them is unrolled. So trees share compiled kernels, and no setting makes compilation long.

The best few are found by repeatedly taking the greatest of int64 keys. A key has the score in its high word, as an
integer of the same order. Its low word decides ties as the heaps of state/host.py do (candidates: lower index first;
guesses: higher slot, then higher token), and names what the key stands for, so nothing has to be gathered. For the N -
1 nodes of a tree that would take long. There a bisection finds the score that separates them from the rest, and each of
the few that are left counts how many go before it. (`tl.topk` would serve for both, but takes a minute and more to
compile at these sizes.)

A barrier separates a store from a load of the same memory by other threads of the CTA.
Bytes: the state, some tens of KB at most, from L1 and L2. The time is that of the chain of dependent loads and
barriers.

state.py has the fields, record.py, pass_kernel.py and harvest_kernel.py the kernels, op.py the operations.
"""

from stagedspec.kernels.grow_tree.op import (
    Inputs,
    check_candidates,
    check_options,
    grow_pass,
    harvest_tree,
    pass_size,
    pass_start,
)
from stagedspec.kernels.grow_tree.state import TREE_DEPTH, TREE_PARENT, GrowthState, words

__all__ = [
    "TREE_DEPTH",
    "TREE_PARENT",
    "GrowthState",
    "Inputs",
    "check_candidates",
    "check_options",
    "grow_pass",
    "harvest_tree",
    "pass_size",
    "pass_start",
    "words",
]
