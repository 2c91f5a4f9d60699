"""Constants that several layers share. Imports neither torch nor Triton."""

BACKENDS = ("auto", "torch", "triton")  # what an option `backend` may be
DTYPES = ("float32", "bfloat16", "float16")  # what models may be in, by torch's names
MAX_HEAD_SIZE = 256  # widest attention head of `tree_attention`

VOCAB_BITS = 21
MAX_VOCAB = 2**VOCAB_BITS - 1  # the n-gram fit packs three tokens into an int64, `grow_pass` a token beside a slot

# The n-gram table's hash table; `models.ngram.hash_slot` says how a key is hashed.
PROBES = 8  # a key lies at most PROBES - 1 slots after the one it hashes to
HASH_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as a signed 64-bit integer
HASH_SHIFT = 32

# Who first proposed a token: the index into `stagedspec.decoding.stats.ORIGINS`.
TARGET, DRAFT, NGRAM = range(3)
# In place of a chosen token: at a node that must not be accepted; at one whose logits allow no choice, which in a tree
# may be another node's doing; and at one where it is known not to be.
UNCHOSEN, INVALID, NO_TOKEN = -1, -2, -3
ROOT_ALONE = 2  # in place of 1 where a row runs (`verify_commit`): its next tree must be a root alone
CONTEXT_LOGPROB = -0.25  # log-probability of a match of the context n-gram: on code, about 4 of 5 are right

HOPPER_SPLIT = 1280  # columns of a weight that a program of linear/hopper.py has in shared memory at most
MOST_SPLITS = 6  # of a weight's columns: the program that adds the parts up holds all of them in registers
