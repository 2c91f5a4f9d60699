"""How Numba compiles the functions of this folder, and where it keeps what it has compiled."""

import contextlib
import hashlib
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.extending import intrinsic

from stagedspec.kernels.common.launch_configs import cache_folder


def _digest() -> str:
    """Of all that a compiled function may be made of. Numba itself looks only at the file that a function is in, and
    other files' functions become part of it."""
    found = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


DIGEST = _digest()
PATIENCE = 1.0  # seconds of compiling before the log says so
log = logging.getLogger("stagedspec")
COMPILED: list[Any] = []  # all functions that Numba compiles
# Decorator of functions that write LLVM instructions. mypy takes what it returns for a function of the same arguments.
instruction: Any = intrinsic


def compiled(function: Callable, wrapped: bool = False, inline: str = "never") -> Callable:
    """Decorator: Numba compiles the function at its first call and keeps the result on disk.

    Only other compiled functions may call it, and Python too if it is `wrapped` (`entry`), which compiles longer.

    Sums of a loop may be reordered, which depends on its length alone; infinities and NaN keep their meaning. A
    division by zero raises nothing: a broken model must not end a generation.
    """
    options: dict[str, Any] = {
        "fastmath": {"reassoc", "contract", "nsz"},
        "nogil": True,
        "error_model": "numpy",
        "no_cpython_wrapper": not wrapped,
        "no_cfunc_wrapper": True,
        "inline": inline,
    }
    COMPILED.append(numba.njit(**options)(function))
    settings: Any = numba.config  # its names are set when it is imported
    with contextlib.suppress(RuntimeError, OSError):  # no folder can be written, or there is no home: nothing is kept
        _keep(COMPILED[-1], Path(settings.CACHE_DIR or cache_folder() / "numba") / DIGEST)
    return COMPILED[-1]


def entry(function: Callable) -> Callable:
    """As `compiled`, for functions that Python calls."""
    return compiled(function, wrapped=True)


def inlined(function: Callable) -> Callable:
    """As `compiled`, for functions that are called in one place. They become part of the function around them before it
    is compiled; else Numba compiles them alone, and once more with every function that contains them."""
    return compiled(function, inline="always")


def succeeds(attempt: Callable[[], object], what: str = "passes") -> bool:
    """Runs attempt(), which compiles functions of this folder or loads them from Numba's cache.

    If that fails, warns and returns False.

    Ctrl-C is delayed until the end, because Numba would stay broken after an interrupt.
    """
    with _delayed(signal.SIGINT), announced():
        try:
            attempt()
        except Exception:  # the cache is damaged or full; Numba's errors have no common type
            try:
                for function in COMPILED:
                    _keep(function, cache_folder() / "numba" / f"{DIGEST}-2")
                attempt()
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warnings.warn(f"{what} cannot be compiled, so they are slower: {reason}", stacklevel=2)
                return False
    return True


def _keep(function: Any, folder: Path) -> None:
    """Makes Numba keep what it compiles of a function in a folder. Raises RuntimeError if that cannot be written."""
    settings: Any = numba.config  # its names are set when it is imported
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        function.enable_caching()
    finally:
        settings.CACHE_DIR = before


@contextmanager
def announced() -> Iterator[None]:
    """Logs that passes are being compiled, if it takes longer than PATIENCE. Loading from the cache does not."""
    timer = threading.Timer(
        PATIENCE, log.warning, ["making passes on this CPU ready: Numba compiles them once on this machine"]
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _delayed(number: int) -> Iterator[None]:
    """Delays a signal until the end of the block. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        yield
    finally:
        signal.signal(number, before)
        if received:
            signal.raise_signal(number)
