"""A draft's head in 8 bits, which halves what a draft's pass must read for it.

A draft proposes and never decides, so the precision of its weights cannot change the output. In e4m3, with a scale for
each row, weights are off by 2.5% (root mean square), and a logit by as much of what logits differ by between tokens: as
many children are accepted (bench/kernels/NOTES.md).
"""

import torch
import torch.nn.functional as F

EIGHT_BITS = torch.float8_e4m3fn
BLOCK = 128  # columns that are permuted among themselves
ROWS = 4096  # converted at a time: in fp32 a whole head would need several times its memory


def to_eight_bits(head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A head [V, d] as [V, d up to a multiple of 128] of e4m3, and the scales of its rows, fp32 [V]: the largest weight
    of a row is the largest value of the type.

    Columns are permuted within each 128, so that a thread reads at once the 16 bytes that it needs of eight matrix
    instructions: bits 6 to 0 of a column's place are bits 2, 1, 6, 5, 4, 3 and 0 of the column.
    """
    rows, width = head.shape
    scales = torch.empty(rows, dtype=torch.float32, device=head.device)
    narrow = torch.empty(rows, width + -width % BLOCK, dtype=EIGHT_BITS, device=head.device)
    for start in range(0, rows, ROWS):
        wide = F.pad(head[start : start + ROWS].float(), (0, -width % BLOCK))
        some = wide.abs().amax(1) / torch.finfo(EIGHT_BITS).max
        some = torch.where(some > 0, some, 1.0)
        columns = (wide / some[:, None]).view(len(some), -1, 8, 2, 4, 2).permute(0, 1, 4, 2, 3, 5)
        scales[start : start + ROWS] = some
        narrow[start : start + ROWS] = columns.reshape(len(some), -1).to(EIGHT_BITS)
    return narrow, scales


def from_eight_bits(head: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """The head [V, width] in fp32 that `to_eight_bits` has left."""
    rows = head.shape[0]
    columns = head.float().view(rows, -1, 4, 8, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(rows, -1)
    return columns[:, :width] * scales[:, None]
