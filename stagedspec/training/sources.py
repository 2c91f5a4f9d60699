"""Finds Python source to train on. Imports no torch, so that the command line can check sources early."""

import importlib.util
import sysconfig
from collections.abc import Iterable
from pathlib import Path


def source_folder(source: str) -> Path:
    """Resolves "stdlib", an installed package's name or a path to a folder of Python source.

    Raises ValueError if there is no such folder.
    """
    if source == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.isidentifier():
        spec = importlib.util.find_spec(source)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    raise ValueError(f"source {source!r} is neither 'stdlib', a folder, nor an installed package")


def check_sources(sources: Iterable[str]) -> None:
    """Raises ValueError that names all missing sources, not only the first."""
    missing = []
    for source in sources:
        try:
            source_folder(source)
        except ValueError:
            missing.append(repr(source))
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise ValueError(
            f"source {', '.join(missing)} {verb} neither 'stdlib', a folder, nor an installed package: install what is "
            "missing, or name other sources (--source stdlib)"
        )
