"""Results of a device on their way to the host."""

import torch


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, of the same shape and dtype.

    From a GPU it is a copy under way, in pinned memory: it must not be read before an event has passed that was
    recorded after this call (`Stopwatch.done`).
    """
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
