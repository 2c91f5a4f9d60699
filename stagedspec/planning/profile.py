"""Files of measurements of a pair of models on a machine: pass times, acceptance profiles and the chosen trees.

A file is for one pair and device (`check`). Without a file a decoder keeps what it measured in the user's cache folder,
under a fingerprint of the pair, the device, the threads and torch's version, and finds it there the next time.
"""

import contextlib
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.common.launch_configs import cache_folder
from stagedspec.planning import cost
from stagedspec.planning.cost import PROFILES, AcceptanceProfile
from stagedspec.planning.tree import MODES, TreeConfig

if TYPE_CHECKING:
    from stagedspec.models.model_set import Models

FORMAT = "stagedspec tuning 1"


@dataclass
class Tuning:
    """Measurements and trees that `stagedspec tune-tree` found.

    pair: the models and the device that they hold for, from `pair_of`. seconds: as in `cost.PassTimes`. profiles: as
    `cost.PROFILES`, by whether sampled, where measured. trees: by (mode, batch, sampled), the smallest first. measured:
    predicted and measured speed, for people to read.
    """

    pair: dict
    seconds: dict[tuple[bool, int, int, bool], float] = field(default_factory=dict)
    profiles: dict[bool, tuple[AcceptanceProfile, ...]] = field(default_factory=dict)
    trees: dict[tuple[str, int, bool], list[TreeConfig]] = field(default_factory=dict)
    measured: list[dict] = field(default_factory=list)

    def profiles_for(self, sampled: bool) -> tuple[AcceptanceProfile, ...]:
        """Acceptance profiles of the draft: those measured, else those of the embedded draft."""
        return self.profiles.get(sampled, PROFILES[sampled])

    def check(self, models: "Models", source: str) -> None:
        """Raises ValueError, naming what differs, unless it was measured on this decoder's models and device."""
        here = pair_of(models)
        wrong = [f"{name} {self.pair.get(name)!r}, here {value!r}" for name, value in here.items()
                 if self.pair.get(name) != value]  # fmt: skip
        if wrong:
            raise ValueError(f"{source} was tuned for something else: {'; '.join(wrong)}. Run `stagedspec tune-tree`")

    def save(self, path: str | Path) -> None:
        """Writes JSON; a file that exists is replaced in one go. Raises OSError where that cannot be done."""
        path = Path(path).expanduser()
        passes = [
            {
                "model": "draft" if draft else "target",
                "batch": batch,
                "rows": rows,
                "sampled": sampled,
                "seconds": value,
            }
            for (draft, batch, rows, sampled), value in sorted(self.seconds.items())
        ]
        trees = [
            {"mode": mode, "batch": batch, "sampled": sampled, "trees": [asdict(tree) for tree in levels]}
            for (mode, batch, sampled), levels in self.trees.items()
        ]
        names = {"sampled" if sampled else "greedy": value for sampled, value in self.profiles.items()}
        content = {"format": FORMAT, "pair": self.pair, "profiles": names, "trees": trees, "measured": self.measured}
        write_text(path, json.dumps(content | {"passes": passes}, indent=1) + "\n", shared=True)

    @classmethod
    def load(cls, path: str | Path) -> "Tuning":
        """Reads what `save` wrote. Raises ValueError for a file that is missing, damaged or something else."""
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"cannot read the tuning {path}: {error.strerror}; `stagedspec tune-tree` writes one"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} is no tuning written by `stagedspec tune-tree`: {error}") from None
        try:
            return cls._read(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no tuning written by `stagedspec tune-tree`, or damaged: {reason}") from None

    @classmethod
    def _read(cls, content: dict) -> "Tuning":
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {content['format']!r}")
        found = cls(dict(content["pair"]), measured=list(content["measured"]))
        for entry in content["passes"]:
            key = entry["model"] == "draft", entry["batch"], entry["rows"], entry["sampled"]
            found.seconds[key] = _number(entry["seconds"], "a pass's seconds", 1e-9, 1e6)
        # Files of earlier releases have the profiles under "stretches".
        for name, profiles in content["profiles" if "profiles" in content else "stretches"].items():
            read = tuple(
                (
                    _number(share, "a kind's share", 0, 1),
                    tuple(_number(rank, "an acceptance", 0, 1) for rank in ranks),
                    _number(hit, "a share of guesses", 0, 1),
                )
                for share, ranks, hit in profiles
            )
            if not read or abs(sum(share for share, _, _ in read) - 1) > 0.05:
                raise ValueError(f"the shares of the {name} profile must sum to 1: run `stagedspec tune-tree` again")
            found.profiles[{"greedy": False, "sampled": True}[name]] = read
        for entry in content["trees"]:
            levels = [TreeConfig(**tree) for tree in entry["trees"]]
            full = levels[-1] if levels else None
            if full is None or len(levels) > 3 or entry["mode"] not in MODES or any(
                not tree.passes or tree.nodes > full.nodes or tree.depth > full.depth for tree in levels
            ):  # fmt: skip
                raise ValueError("expected one to three trees, the largest last, for a mode that drafts")
            found.trees[entry["mode"], entry["batch"], entry["sampled"]] = levels
        return found


def _number(value: object, name: str, low: float, high: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


# ---------------------------------------------------------------- what a tuning holds for


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pair_of(models: "Models") -> dict:
    """The properties of models and device that must be the same for a tuning to be used."""
    return {
        "vocabulary": models.target.vocab_size,
        "target parameters": models.target.parameters,
        "draft parameters": None if models.draft is None else models.draft.parameters,
        "n-gram tokens": None if models.ngram is None else models.ngram.fitted_tokens,
        "device": device_name(models.device),
        "dtype": str(models.target.dtype).removeprefix("torch."),
        "backend": models.backend,
    }


def fingerprint(models: "Models") -> str:
    """A name for the pair, down to its weights, on this machine with these threads, this torch and this cost model."""
    setup = pair_of(models) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    both = [model for model in (models.target, models.draft) if model is not None]
    setup["compiled"] = [None if model.compiled is None else model.compiled.digest for model in both]
    setup["rows"] = both[0].ops.timed_rows
    if models.backend == "triton":
        setup["triton"] = version("triton")
    found = hashlib.sha256(json.dumps(setup).encode())
    found.update(Path(cost.__file__).read_bytes())
    for model in (models.target, models.draft):
        if model is not None:  # a sample: reading every weight of a large model takes seconds
            for weights in (*model.final_norm, model.token_table[:64], model.position_table[:8]):
                found.update(weights.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:24]


def cache_file(models: "Models") -> Path:
    """Where the models' own measurements are kept."""
    return cache_folder() / f"{fingerprint(models)}.json"


def recall(models: "Models") -> Tuning:
    """What an earlier process kept, or an empty tuning."""
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        found = Tuning.load(cache_file(models))
        found.check(models, "the cache")
        return found
    return Tuning(pair_of(models))


def keep(models: "Models", tuning: Tuning) -> Path | None:
    """Saves for later processes. Returns the file's path, or None if it cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        path = cache_file(models)
        path.parent.mkdir(parents=True, exist_ok=True)
        tuning.save(path)
        return path
    return None
