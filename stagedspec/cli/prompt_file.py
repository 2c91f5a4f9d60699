"""Prompts in a file of JSON lines, and their completions in another one, which a later run can go on with."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagedspec.kernels.common.files import replacing, write_text
from stagedspec.tuning.prompts import read_objects


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file. ids: of each, None without an id field; lines: their numbers from 1; digest: of all that
    decides completions."""

    texts: list[str]
    ids: list[str | int] | None
    lines: list[int]
    digest: str

    def name(self, index: int) -> str:
        """A prompt as messages name it."""
        line = f"line {self.lines[index]}"
        return f"in {line}" if self.ids is None else f"{self.ids[index]!r} in {line}"

    @classmethod
    def read(cls, path: Path, field: str, id_field: str | None) -> "Prompts":
        """Raises ValueError, naming the line, for a file that cannot be read, a field that is missing or of another
        type, and an id that came before."""
        texts: list[str] = []
        ids: list[str | int] = []
        lines: list[int] = []
        line_of: dict[str | int, int] = {}
        for number, values in read_objects(path):
            for name in (field, id_field):
                if name is not None and name not in values:
                    known = ", ".join(map(repr, list(values)[:8])) or "no field at all"
                    raise ValueError(f"{path}: line {number} has no field {name!r}; it has {known}")
            text = values[field]
            if not isinstance(text, str):
                raise ValueError(f"{path}: {field!r} of line {number} must be text, got {type(text).__name__}")
            texts.append(text)
            lines.append(number)
            if id_field is None:
                continue
            own = values[id_field]
            if not isinstance(own, (str, int)) or isinstance(own, bool):
                raise ValueError(
                    f"{path}: {id_field!r} of line {number} must be text or a whole number, got {type(own).__name__}"
                )
            if own in line_of:
                raise ValueError(f"{path}: lines {line_of[own]} and {number} both have the {id_field} {own!r}")
            line_of[own] = number
            ids.append(own)
        digest = hashlib.sha256(json.dumps([texts, ids]).encode()).hexdigest()
        return cls(texts, None if id_field is None else ids, lines, digest)


class Completions:
    """A file of JSON lines that grows by whole lines, each with the `index` of its prompt and its `sample`.

    What was written before stays: the pairs are in `done`. A last line that was cut off is removed. The settings of the
    first run lie beside the file, in NAME.run.json. No other process can use the file until `close`, or the end of this
    one, however it ends: it holds a lock of the operating system, on the empty file NAME.lock.

    Raises ValueError for a file that another run is writing, that another command wrote, or that was begun with other
    settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        from filelock import FileLock, Timeout  # takes a while, and --help should answer at once

        self.path, self.settings = path, settings
        _, self._settings_path, lock, *_ = self.files(path)
        self.done: set[tuple[int, int]] = set()
        self._file = -1  # not open
        self._lock = FileLock(lock, timeout=0)
        try:
            if lock.exists() and lock.stat().st_size:  # to take it would empty it
                raise ValueError(f"--out: {lock} is not a lock of this command: choose another file, or remove it")
            self._lock.acquire()
            whole = self._read()
            if self._settings_path.exists():
                self._check_settings(differ=not whole)
        except Timeout:
            raise ValueError(
                f"--out: another run is writing {path}: wait until it has ended, or choose another file"
            ) from None
        except BaseException:
            self.close()
            raise
        self._size = len(whole)

    @staticmethod
    def files(path: Path) -> list[Path]:
        """The files that a run writes: the completions, their settings, the lock, and what takes their places."""
        return [path.with_name(path.name + end) for end in ("", ".run.json", ".lock", ".part", ".run.json.part")]

    def _read(self) -> bytes:
        """The whole lines of the file."""
        if not self.path.exists():
            return b""
        held = self.path.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        if held and not self._settings_path.exists():
            raise ValueError(
                f"--out: {self.path} was not written by this command ({self._settings_path.name} is missing): choose "
                "another file, or remove it"
            )
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                pair = int(values["index"]), int(values["sample"])
                if pair in self.done:
                    raise ValueError("a second completion")
                self.done.add(pair)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--out: line {number} of {self.path} is not one that this command wrote: choose another file, or "
                    "remove the line"
                ) from None
        return whole

    def _check_settings(self, differ: bool = False) -> None:
        """Raises ValueError if the file of settings is not ours, or unless differ, if it has others."""
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
            differing = [name for name, value in self.settings.items() if before[name] != value]
        except (OSError, ValueError, KeyError, TypeError):  # also those of another version
            raise ValueError(
                f"--out: {self._settings_path} cannot be read as settings of this command: choose another file, or "
                f"remove it and {self.path} to begin anew"
            ) from None
        for name in differing if not differ else ():
            raise ValueError(
                f"--out: {self.path} was begun with {_shown(name, before[name])}, and this run has "
                f"{_shown(name, self.settings[name])}: repeat the first run's options, or choose another file"
            )

    def begin(self, **more: Any) -> None:
        """Opens the file. more: further settings. Raises ValueError if they are not those of the first run."""
        self.settings = {**self.settings, **more}
        if self._size:
            self._check_settings()
        try:
            if not self._size:
                write_text(self._settings_path, json.dumps(self.settings, indent=1) + "\n")
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error) from None

    def add(self, values: dict[str, Any]) -> None:
        """Writes a line. Raises OSError where there is no room for it, and then leaves what was there."""
        line = json.dumps(values).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise self._failed(error) from None
        self._size += len(line)
        self.done.add((values["index"], values["sample"]))

    def close(self) -> None:
        """Lets other processes use the file. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def sort(self) -> None:
        """Puts the lines into the order of the prompts."""
        held = self.path.read_bytes()
        lines = [line for line in held.splitlines(keepends=True) if line.endswith(b"\n")]

        def place(line: bytes) -> tuple[int, int]:
            values = json.loads(line)
            return values["index"], values["sample"]

        ordered = sorted(lines, key=place)
        if b"".join(ordered) != held:
            try:
                with replacing(self.path) as part:
                    part.write_bytes(b"".join(ordered))
            except OSError as error:
                raise self._failed(error) from None

    def _failed(self, error: OSError) -> OSError:
        return OSError(
            f"cannot write {self.path}: {error.strerror or error}; {len(self.done):,} completions are kept, and the "
            "same command goes on with the rest"
        )


def _shown(name: str, value: object) -> str:
    if name in ("prompts", "weights"):
        return f"other {name} ({str(value)[:8]})"
    return f"{name.replace('_', ' ')} {json.dumps(value)}"
