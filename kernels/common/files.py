"""Files that appear whole: written beside their place, then moved there in one step."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Gives the path of a file to write, which takes the place of `path` at the end, or is removed after an error.

    It has the permissions of a file that was there. A link, a pipe or a device is written to directly, for there is
    nothing to put in its place.
    shared: other threads and processes may write the same file at the same time. Without it, what a killed process
    left is overwritten by the next one. Raises OSError where the file cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    writer = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    part = path.with_name(f"{path.name}{writer}.part")
    try:
        there = path.exists()
        if there:
            part.touch(0o600)  # nobody else reads what may not be theirs to read
        yield part
        if there:
            with suppress(OSError):  # it has gone meanwhile, or the file system knows no permissions
                shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Writes UTF-8 text; a file that exists is replaced in one step. shared, links, errors: as `replacing`."""
    with replacing(path, shared) as part:
        part.write_text(text, encoding="utf-8")
