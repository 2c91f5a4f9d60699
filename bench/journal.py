"""A file of measurements so far, so that an interrupted benchmark continues where it stopped.

One JSON object a line, appended as soon as it is known, under a key of everything that could change it. Lines of other
keys are left alone; a last line that was cut off is dropped.
"""

import hashlib
import json
import uuid
from pathlib import Path

import torch

import stagedspec
from stagedspec.kernels.common.files import write_text
from stagedspec.tuning.compare import Run, Timed

HERE = Path(__file__).parent


def code_fingerprint() -> str:
    """A hash of the sources of package and benchmarks. After a change older measurements are not reused."""
    package = Path(stagedspec.__file__).parent
    kernels = Path(stagedspec.kernels.__file__).parent
    found = hashlib.sha256()
    for path in sorted(
        {*package.rglob("*.py"), *kernels.rglob("*.py"), *HERE.glob("*.py")}, key=lambda path: path.as_posix()
    ):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """A file of measurements under one key.

    settings: everything that could change them, JSON-able. fresh: forget what is there under this key.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool = False):
        self.path = path
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [(line, entry) for line in lines if (entry := _entry(line)) is not None]
        if fresh:
            kept = [(line, entry) for line, entry in kept if entry["key"] != self.key]
        if len(kept) != len(lines):
            write_text(path, "".join(line + "\n" for line, _ in kept))
        self.entries = [entry for _, entry in kept if entry["key"] == self.key]
        self._round: tuple = ()
        self._name = ""

    def add(self, **entry) -> None:
        """Appends one measurement."""
        self.entries.append({"key": self.key, **entry})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.entries[-1]) + "\n")

    def add_run(self, title: str, timed: Timed, prompt: torch.Tensor) -> None:
        """Appends one run of a comparison. Runs of one round, which ran next to each other, have the same name."""
        place = (title, timed.repeat, timed.prompt)
        if place != self._round:
            self._round, self._name = place, uuid.uuid4().hex[:12]
        self.add(
            round=self._name, title=title, prompt=prompt_hash(prompt), repeat=timed.repeat, side=timed.side,
            seconds=timed.seconds, tokens=timed.run.tokens, stats=timed.run.stats,
        )  # fmt: skip

    def rounds(self, title: str, sides: list[str], prompts: list[torch.Tensor]) -> dict[tuple[int, int], list[Timed]]:
        """Finished rounds of a comparison by (repeat, index of the prompt): those in which every side ran."""
        found: dict[tuple, dict[str, dict]] = {}
        for entry in self.entries:
            if entry.get("title") == title and entry["side"] in sides:
                found.setdefault((entry["repeat"], entry["prompt"], entry["round"]), {})[entry["side"]] = entry
        done = {}
        for index, prompt in enumerate(prompts):
            name = prompt_hash(prompt)
            for (repeat, of, _), runs in found.items():
                if of == name and runs.keys() >= set(sides):
                    done[repeat, index] = [_timed(run, index) for run in runs.values()]
        return done


def prompt_hash(prompt: torch.Tensor) -> str:
    """A hash of a prompt's tokens [1, L]."""
    return hashlib.sha256(json.dumps(prompt.tolist()).encode()).hexdigest()[:16]


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and "key" in entry else None


def _timed(entry: dict, index: int) -> Timed:
    return Timed(entry["side"], index, entry["repeat"], Run(entry["tokens"], entry["stats"]), entry["seconds"])
