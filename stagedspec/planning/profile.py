"""What was measured of a pair of models on a machine, kept in a file: pass times, acceptance and the chosen trees.

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
from stagedspec.planning.cost import STRETCHES, Stretch
from stagedspec.planning.tree import MODES, TreeConfig

if TYPE_CHECKING:
    from stagedspec.decoder import Decoder

FORMAT = "stagedspec tuning 1"


@dataclass
class Tuning:
    """What `stagedspec tune-tree` found.

    pair: what it holds for, of `pair_of`. seconds: as in `cost.PassTimes`. stretches: by whether sampled, as
    `cost.STRETCHES`, where measured. trees: (mode, batch, sampled) to the ladder, smallest tree first. measured:
    predicted against measured speed, for people to read.
    """

    pair: dict
    seconds: dict[tuple[bool, int, int, bool], float] = field(default_factory=dict)
    stretches: dict[bool, tuple[Stretch, ...]] = field(default_factory=dict)
    trees: dict[tuple[str, int, bool], list[TreeConfig]] = field(default_factory=dict)
    measured: list[dict] = field(default_factory=list)

    def text_of(self, sampled: bool) -> tuple[Stretch, ...]:
        """How text lies before the draft: as measured, else as before the embedded one."""
        return self.stretches.get(sampled, STRETCHES[sampled])

    def check(self, decoder: "Decoder", source: str) -> None:
        """Raises ValueError, naming what differs, unless it was measured on this decoder's models and device."""
        here = pair_of(decoder)
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
            {"mode": mode, "batch": batch, "sampled": sampled, "trees": [asdict(tree) for tree in ladder]}
            for (mode, batch, sampled), ladder in self.trees.items()
        ]
        names = {"sampled" if sampled else "greedy": value for sampled, value in self.stretches.items()}
        content = {"format": FORMAT, "pair": self.pair, "stretches": names, "trees": trees, "measured": self.measured}
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
        for name, stretches in content["stretches"].items():
            read = tuple(
                (
                    _number(share, "a stretch's share", 0, 1),
                    tuple(_number(rank, "an acceptance", 0, 1) for rank in ranks),
                    _number(hit, "a share of guesses", 0, 1),
                )
                for share, ranks, hit in stretches
            )
            if not read or abs(sum(share for share, _, _ in read) - 1) > 0.05:
                raise ValueError(f"the shares of the {name} stretches must sum to 1: run `stagedspec tune-tree` again")
            found.stretches[{"greedy": False, "sampled": True}[name]] = read
        for entry in content["trees"]:
            ladder = [TreeConfig(**tree) for tree in entry["trees"]]
            full = ladder[-1] if ladder else None
            if full is None or len(ladder) > 3 or entry["mode"] not in MODES or any(
                not tree.passes or tree.nodes > full.nodes or tree.depth > full.depth for tree in ladder
            ):  # fmt: skip
                raise ValueError("trees must be ladders of one to three, the largest last, for a mode that drafts")
            found.trees[entry["mode"], entry["batch"], entry["sampled"]] = ladder
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


def pair_of(decoder: "Decoder") -> dict:
    """What must be the same for a tuning to hold."""
    return {
        "vocabulary": decoder.target.vocab_size,
        "target parameters": decoder.target.parameters,
        "draft parameters": None if decoder.draft is None else decoder.draft.parameters,
        "n-gram tokens": None if decoder.ngram is None else decoder.ngram.fitted_tokens,
        "device": device_name(decoder.device),
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "backend": decoder.backend,
    }


def fingerprint(decoder: "Decoder") -> str:
    """A name for the pair, down to its weights, on this machine with these threads, this torch and this cost model."""
    setup = pair_of(decoder) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if decoder.backend == "triton":
        setup["triton"] = version("triton")
    found = hashlib.sha256(json.dumps(setup).encode())
    found.update(Path(cost.__file__).read_bytes())
    for model in (decoder.target, decoder.draft):
        if model is not None:  # a sample: reading every weight of a large model takes seconds
            for weights in (*model.final_norm, model.token_table[:64], model.position_table[:8]):
                found.update(weights.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:24]


def cache_file(decoder: "Decoder") -> Path:
    """Where the decoder's own measurements are kept."""
    return cache_folder() / f"{fingerprint(decoder)}.json"


def recall(decoder: "Decoder") -> Tuning:
    """What an earlier process kept, or an empty tuning."""
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        found = Tuning.load(cache_file(decoder))
        found.check(decoder, "the cache")
        return found
    return Tuning(pair_of(decoder))


def keep(decoder: "Decoder", tuning: Tuning) -> Path | None:
    """Saves for later processes; where that cannot be done, nothing happens and None comes back."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        path = cache_file(decoder)
        path.parent.mkdir(parents=True, exist_ok=True)
        tuning.save(path)
        return path
    return None
