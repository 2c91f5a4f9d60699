"""Attention of a pass's nodes over the committed prefix and their own ancestors; appends the pass's K and V.

    out[n, h] = softmax(scale * q[n, h] . k[t, g])_t v[t, g]   over the positions t = 0 .. p(n), g = h's KV head

A node's mask holds its ancestors in the tree and itself, one bit a tree row; its position is
p = prefix + popcount(mask) - 1, and the key at position t >= prefix lies in the row of the mask's (t - prefix)-th bit.

A node's result has the same bits whatever other nodes are in the pass and wherever its ancestors are stored. So how a
key is processed depends on its distance alone:

- *near* keys, positions (p - window, p]: any ancestor that may not be committed yet. Each node gathers its own, from
  the cache or from this pass's qkv, in order of position. A tile holds the keys of a few nodes one after another.
- *far* keys, positions <= p - window: one row of the cache for all nodes, in splits at absolute multiples of SPLIT.

In the far part, keys and values are the left operand of the matrix products and the queries the narrow right one, so
that one family of matrix instructions serves every number of nodes. A near tile always has the same shape.
Keys that a node does not see, its neighbours' near keys too, have a weight of exactly zero and add exactly nothing.

Sums run over splits in ascending order, then the near part, each relative to the greatest score so far.

Two launches. The far one leaves (maximum, sum, weighted values) of each split in scratch; the near one adds the near
part and writes the result. With programmatic dependent launch the near one starts when the far one has seen the pass's
qkv complete, does its own part meanwhile, and waits only then. It may read qkv because every far
program waits for qkv before it lets the near kernel start, and because of the fence at its own beginning: complete
results are in L2. PTX itself promises that only to the grid that waited.

Bytes: the keys and values of the prefix once, 2*L*H_kv*D elements a sequence (and a tile of queries), the qkv
and the appended rows; through L2 also the gathered near rows, 2*window*D a query, and the partial results,
8*(L/SPLIT)*D a query.

Chunks of a prompt have a kernel of their own, prompt.py: no node has ancestors that may still be dropped, so a
query meets blocks of keys at absolute multiples of their size, in ascending order, as in FlashAttention 2 (arXiv
2307.08691). Its bits are the same in any chunks and any batch, but not those of a pass of a tree. Every mode reads a
prompt the same way, so all modes start from the same keys and values.

far.py, near.py and prompt.py have the kernels, op.py the operation.
"""

from stagedspec.kernels.tree_attention.op import MAX_NODES, WINDOW, mask_words, scratch_size, tree_attention

__all__ = ["MAX_NODES", "WINDOW", "mask_words", "scratch_size", "tree_attention"]
