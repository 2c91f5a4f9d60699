"""Constants that kernels share with the host's state, or with each other; without torch and Triton."""

# Who first proposed a token: the index into `stagedspec.decoding.stats.ORIGINS`.
TARGET, DRAFT, NGRAM = range(3)
# In place of a chosen token: at a node that must not be accepted, and at one whose logits allow no choice.
UNCHOSEN, INVALID = -1, -2
CONTEXT_LOGPROB = -0.25  # log-probability of a match of the context n-gram: on code, about 4 of 5 are right

HOPPER_SPLIT = 1280  # columns of a weight that a program of linear/hopper.py has in shared memory at most
MOST_SPLITS = 6  # of a weight's columns: whoever adds the parts up holds all of them in registers
