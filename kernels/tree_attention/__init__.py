"""Attention of a pass's nodes over the committed prefix and their own ancestors; appends the pass's K and V.

    out[n, h] = softmax(scale * q[n, h] . k[t, g])_t v[t, g]   over the positions t = 0 .. p(n), g = h's KV head

A node's mask holds its ancestors in the tree and itself, one bit a tree row; its position is
p = prefix + popcount(mask) - 1, and the key at position t >= prefix lies in the row of the mask's (t - prefix)-th bit.

A node's result has the same bits whatever other nodes are in the pass and wherever its ancestors are stored. So how a
key is processed depends on its distance alone:

- *near* keys, positions (p - window, p]: any ancestor that may not be committed yet. Each node gathers its own, from
  the cache or from this pass's qkv, in order of position. A tile holds the keys of a few nodes one after another.
- *far* keys, positions <= p - window: one row of the cache for all nodes, in blocks at multiples of their size.

Keys that a node does not see, its neighbours' near keys too, have a weight of exactly zero and add exactly nothing. The
far and the near keys are summed apart, in an order that the position alone decides, each part relative to its own
greatest score; then both are brought to the greater of the two scores and added.

The window must be at least the number of bits in any mask. A draft's pass begins one token above the root, so a tree
may be at most window - 2 deep: 30, with the window of 32 that the decoder has.

There are two ways to compute this. Which one runs depends on what all passes have in common, since each has bits of its
own:

- hopper.py, one launch, for heads of 64 in 16-bit types and a window of 32 on Hopper: a program has all keys of a tile
  of queries. Of every 256 keys each of eight warps takes 32, and keeps sums over its far and its near keys, each
  relative to its greatest score so far; at the end the warps' far and near sums are added up in one order.
- far.py and near.py, two launches, everywhere else. The far one takes a split of the keys a program and leaves
  (maximum, sum, weighted values) in scratch; keys and values are the left operand of its matrix products and the
  queries the narrow right one, so that one family of matrix instructions serves every number of nodes. The near one
  computes the near part, in tiles that always have the same shape, adds up the splits in order of position, then the
  two parts, and writes the result. With programmatic dependent launch it starts when the far one has seen the pass's
  qkv complete, does its own part meanwhile, and waits only then. It may read qkv because every far program waits for
  qkv before it lets the near kernel start, and because of the fence at its own beginning: complete results are in L2.
  PTX itself promises that only to the grid that waited.

Bytes: the keys and values of the prefix once, 2*L*H_kv*D elements a sequence (and a tile of queries), the qkv
and the appended rows; through L2 also the gathered near rows, 2*window*D a query, and in two launches the partial
results, 8*(L/SPLIT)*D a query.

Chunks of a prompt have a kernel of their own, prompt.py: no node has ancestors that may still be dropped, so a
query meets blocks of keys at absolute multiples of their size, in ascending order, as in FlashAttention 2 (arXiv
2307.08691). Its bits are the same in any chunks and any batch, but not those of a pass of a tree. Every mode reads a
prompt the same way, so all modes start from the same keys and values.

op.py has the operation, the other files the kernels, shared.py what they share.
"""

from stagedspec.kernels.tree_attention.op import MAX_NODES, WINDOW, mask_words, scratch_size, tree_attention

__all__ = ["MAX_NODES", "WINDOW", "mask_words", "scratch_size", "tree_attention"]
