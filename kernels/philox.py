"""The noise of single tokens inside a kernel: `reference.philox` and `reference.gumbel`."""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words of 32 random bits, uint32, from uint32 counters and keys (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        b_high0, b_low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        b_high2, b_low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1 = b_high2 ^ c1 ^ k0, b_low2
        c2, c3 = b_high0 ^ c3 ^ k1, b_low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_of(seed_lo, seed_hi, stream, position, token):
    """g(seed, stream, position, token), fp32, of broadcastable int32 arguments; always finite."""
    b_zero = token * 0 + position * 0
    b_quad = ((token >> 2) + b_zero).to(tl.uint32, bitcast=True)
    b_position = (position + b_zero).to(tl.uint32, bitcast=True)
    b_stream = (stream + b_zero).to(tl.uint32, bitcast=True)
    b_none = b_zero.to(tl.uint32, bitcast=True)
    b_key0 = (seed_lo + b_zero).to(tl.uint32, bitcast=True)
    b_key1 = (seed_hi + b_zero).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox(b_quad, b_position, b_stream, b_none, b_key0, b_key1)
    b_lane = (token & 3) + b_zero
    b_word = tl.where(b_lane == 0, w0, tl.where(b_lane == 1, w1, tl.where(b_lane == 2, w2, w3)))
    b_v = tl.minimum((b_word.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)
    # log(1 - v) as fp32 has it would lose small v; Kahan's correction gives log1p from log.
    b_rest = 1.0 - b_v
    b_log = tl.where(b_rest == 1.0, -b_v, tl.log(b_rest) * (b_v / tl.where(b_rest == 1.0, 1.0, 1.0 - b_rest)))
    return -tl.log(-b_log)
