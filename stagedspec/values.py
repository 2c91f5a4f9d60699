"""Numbers in arguments: turns those of NumPy and torch into Python's own. Imports neither, for the command line."""

import operator
from typing import Any


def whole(value: Any) -> int | None:
    """A whole number of any kind as an int; None for anything else, True and False included."""
    if _is_truth(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises the last for tensors of several numbers
        return None


def real(value: Any) -> float | None:
    """A number of any kind as a float; None for anything else, True, False and what no float can hold included."""
    if _is_truth(value) or isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def at_least(name: str, value: object, least: int = 1) -> int:
    """The whole number `value`. Raises ValueError for anything else, and for less than `least`."""
    number = whole(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def truth(name: str, value: object) -> bool:
    """True or False, for which 1, 0 and None stand too. Raises ValueError for anything else."""
    if value is None:
        return False
    if _is_truth(value) or whole(value) in (0, 1):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays as Python's own, also in lists and tuples; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
