"""The paper from nothing in one command: trains target, draft and n-gram table, tunes trees, measures, draws.

    python bench/paper_gpu.py --out FOLDER [--minutes 28] [--prompts HumanEval.jsonl.gz] [--preset gpt2-large]

Stages: train (stagedspec.training.recipe), tune (tuning/trees.py), measure (paper.py), ablation (ablation.py),
acceptance (acceptance.py). Each continues from its files in FOLDER; the same command goes on after an interruption.
The time is for everything: training has fixed shares of it, and every later stage its share of what is left, so that
the last ones measure less where something took longer. FOLDER/summary.md holds what there is, after every stage, and
FOLDER/state.json where the run is. On a GPU GPT-2 L, else the embedded models' sizes. See bench/README.md.
"""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ablation
import acceptance
import paper
import torch
from rich.console import Console

from machine import commit
from report import FIGURES, markdown, update_readme
from sides import clear_errors
from stagedspec.cli.output import quiet_transformers
from stagedspec.decoder import Decoder
from stagedspec.devices import resolve_device
from stagedspec.kernels.common.files import write_text
from stagedspec.training import recipe
from stagedspec.training.sources import check_sources
from stagedspec.tuning.prompts import PROMPTS, read_prompts
from stagedspec.tuning.trees import tune

# Shares of the whole time that training may take; corpus, loading and export take what they need.
TRAINING = {"target": 0.27, "target_samples": 0.03, "pretraining": 0.058, "draft": 0.115, "draft_samples": 0.02}
# Weights by which the stages after training divide what is left, but for a share of the whole time that none is given:
# each ends what it has begun, and writes its report.
LATER, IN_HAND = {"tune": 4, "measure": 18, "ablation": 2, "acceptance": 1.5}, 0.03
README_PART = "paper-gpu"
LEAST = 2.0  # seconds that a stage is given, however late it is
ASSETS = Path("train", "assets")


class Interrupted(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


@dataclass
class State:
    """Where a run is, written to state.json every few seconds by a thread of its own.

    minutes: of the plan; training: of the plan when the run began, by which training is planned. commit: of the code,
    every one that has worked on this run. spent: seconds of all processes that did. stage, at: what is under way, and
    its last report. done: stages that ended, with their seconds; failed: stages that did not, with their messages.
    """

    minutes: float
    training: float | None = None
    commit: str | None = None
    spent: float = 0.0
    stage: str = ""
    at: dict | None = None
    done: dict | None = None
    failed: dict | None = None

    def __post_init__(self) -> None:
        self.done, self.failed = self.done or {}, self.failed or {}
        self.training = self.training or self.minutes
        self._before, self._began = self.spent, time.perf_counter()

    @classmethod
    def read(cls, path: Path) -> "State":
        """The state that an earlier process left. Raises ValueError if there is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: name the folder of a run") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove the folder to begin again") from None

    @classmethod
    def load(cls, path: Path, minutes: float) -> "State":
        """The state of an earlier process, or a new one, with this code's commit."""
        if not path.exists():
            return cls(minutes, commit=commit())
        found = cls.read(path)
        found.failed, now = {}, commit()
        known = [] if found.commit is None else found.commit.split(", ")
        if now is not None and now not in known:  # what an earlier one trained or measured is not made again
            found.commit = ", ".join([*known, now])
        if found.minutes != minutes:  # with more time, what measures goes on; training is over when it is over
            found.minutes, found.done = minutes, {name: taken for name, taken in found.done.items() if name == "train"}
        return found

    def save(self, path: Path) -> None:
        self.spent = self._before + time.perf_counter() - self._began
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def left(self) -> float:
        """Seconds of the plan that are left."""
        return 60 * self.minutes - self._before - (time.perf_counter() - self._began)

    def __str__(self) -> str:
        at = {key: value for key, value in (self.at or {}).items() if not isinstance(value, dict)}
        shown = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in at.items())  # fmt: skip
        return f"in {self.stage or 'nothing'} after {self.spent:.0f} s" + f" ({shown})" * bool(shown)


# ---------------------------------------------------------------- stages


def training_config(options: argparse.Namespace, minutes: float) -> recipe.TrainConfig:
    """The preset with its shares of the time, and the sources that are given, else those of its own that are there."""
    config = recipe.preset(options.preset, device=options.device)
    total = 60 * minutes
    settings: dict[str, Any] = {"compiled": options.compile}
    for name in ("target", "pretraining", "draft"):
        given, fit = getattr(options, f"{name}_seconds"), getattr(config, f"{name}_fit")
        if fit is not None:
            settings[f"{name}_fit"] = replace(fit, seconds=TRAINING[name] * total if given is None else given)
    for name in ("target", "draft"):
        settings[f"{name}_sample_seconds"] = TRAINING[f"{name}_samples"] * total
    return replace(config, sources=tuple(options.source or _installed(config.sources)), **settings)


def _installed(sources: tuple[str, ...]) -> list[str]:
    found = []
    for source in sources:
        with suppress(ValueError):
            check_sources([source])
            found.append(source)
    return found


def train(options: argparse.Namespace, minutes: float, report: Callable[[dict], None]) -> None:
    """Corpus, target, samples, draft, samples, n-gram table, export."""
    last = [""]

    def show(values: dict) -> None:
        report(values)
        ended = values.get("skipped") or values["step"] == values["steps"]
        if ended or values["stage"] != last[0] or "heldout_bpb" in values:
            print(json.dumps(values), flush=True)
        last[0] = values["stage"]

    recipe.train(training_config(options, minutes), Path("train"), show)


def tune_trees(options: argparse.Namespace, seconds: float) -> None:
    """Trees for the pair, into tree.json."""
    path = Path("tree.json")
    if path.exists():
        return
    decoder = Decoder.from_pretrained(
        *(str(ASSETS / name) for name in ("target", "draft", "ngram.safetensors")), device=options.device
    )
    assert decoder.tokenizer is not None
    # Not the prompts that are measured.
    rows = [decoder.tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    new = options.max_new_tokens  # as measured later: the longer a text, the more it repeats
    room = decoder.target.positions - new
    # Its last part, timing the modes, has no limit.
    tuning = tune(decoder, [row[-room:] for row in rows][: 8 if options.gpu else 4], new, seconds=0.6 * seconds)
    tuning.save(path)


def script(module: Any, options: argparse.Namespace, seconds: float, more: list[str]) -> bool:
    """Runs a benchmark on the trained pair, in this process; returns whether all outputs were the same."""
    names = {"target": "target", "draft": "draft", "ngram": "ngram.safetensors"}
    arguments = [part for name, file in names.items() for part in (f"--{name}", str(ASSETS / file))]
    arguments += ["--tree", "tree.json"] * (module is not acceptance)
    if options.prompts is not None:
        arguments += ["--prompts", str(options.prompts)]
    arguments += ["--device", options.device, "--dtype", "bfloat16" if options.gpu else "float32"]
    arguments += ["--seconds", f"{seconds:.0f}", "--out", module.__name__, *more]
    return module.bench(module.parse(arguments), arguments, Console(soft_wrap=True))


def later_stages(options: argparse.Namespace) -> dict[str, Callable[[float], Any]]:
    """The stages after training, each a function of the seconds that it may take."""
    new = ["--max-new-tokens", str(options.max_new_tokens)]
    peers = ["--peer-prompts", str(options.peer_prompts)]
    return {
        "tune": lambda seconds: tune_trees(options, seconds),
        "measure": lambda seconds: script(paper, options, seconds, ["--limit", str(options.limit), *new, *peers]),
        "ablation": lambda seconds: script(ablation, options, seconds, ["--limit", "4", *new]),
        "acceptance": lambda seconds: script(
            acceptance,
            options,
            seconds,
            [
                "--limit",
                "32" if options.gpu else "8",
                "--draws",
                "4",
                "--max-new-tokens",
                str(min(64, options.max_new_tokens)),
            ],
        ),
    }


# ---------------------------------------------------------------- what came out


def summary(state: State) -> str:
    """All that there is so far, as Markdown."""
    parts = [f"# The paper, measured here\n\ncommit {state.commit}; {state}"]
    parts += [f"{stage} failed: {message}" for stage, message in (state.failed or {}).items()]
    lines = []
    for stage in recipe.STAGES:
        values = _last(Path("train", f"{stage}.jsonl"))
        if values:
            lines.append([stage, str(values["step"]), *(
                "-" if values.get(key) is None else f"{values[key] * scale:.{digits}f}"
                for key, scale, digits in (("loss", 1, 3), ("heldout_bpb", 1, 3), ("agreement", 100, 1),
                                           ("overlap", 100, 1), ("tokens_per_second", 1, 0), ("tflops", 1, 0))
            )])  # fmt: skip
    if lines:
        headings = [
            "training",
            "steps",
            "loss",
            "held-out bits/byte",
            "agreement, %",
            "overlap, %",
            "tokens/s",
            "TFLOP/s",
        ]
        parts.append("## Training\n\n" + markdown(headings, lines))
    if Path("tree.json").exists():
        measured = json.loads(Path("tree.json").read_text(encoding="utf-8"))["measured"]
        parts.append("## Trees: predicted and measured\n\n" + markdown(
            ["mode", "tokens/s predicted", "measured", "tokens/step predicted", "measured", "same output"],
            [[row["mode"] + ", sampled" * row["sampled"], f"{row['predicted_tokens_per_second']:.0f}",
              f"{row['measured_tokens_per_second']:.0f}", f"{row['predicted_tokens_per_step']:.2f}",
              f"{row['measured_tokens_per_step']:.2f}", "yes" if row["identical"] else "NO"] for row in measured],
        ))  # fmt: skip
    for name in ("paper", "ablation", "acceptance"):
        path = Path(name, f"{name}.md")
        if path.exists():
            text = re.sub(r"\]\(([^)/]+\.(?:svg|html))\)", rf"]({name}/\1)", path.read_text(encoding="utf-8"))
            parts.append(f"## {name.capitalize()}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def readme_part(text: str) -> tuple[str, list[Path]]:
    """A summary as the part of bench/README.md that --update-readme writes, and its figures."""
    text = re.sub(r"^#+ (.+)$", r"**\1**", text.partition("\n\n")[2], flags=re.MULTILINE)
    links = re.compile(r"\]\(((?:paper|ablation|acceptance)/([^)/]+))\)")
    figures = [Path(path) for path, _ in links.findall(text)]
    return links.sub(rf"]({FIGURES.name}/{README_PART}-\2)", text), figures


def _last(log: Path) -> dict:
    """The values of a training stage's log, each as it was last reported."""
    found: dict = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with suppress(json.JSONDecodeError):  # cut off when the run was killed
            found |= json.loads(line)
    return found


# ---------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=28.0, help="for everything (default 28)")
    parser.add_argument("--preset", help="what is trained: gpt2-large on a GPU, else embedded-cpu")
    parser.add_argument("--source", action="append", help="Python source, repeatable; default: the preset's, if there")
    parser.add_argument("--target-seconds", type=float, help="of training (default: 0.27 of the time)")
    parser.add_argument(
        "--pretraining-seconds", type=float, help="of the draft on the corpus (default: 0.058 of the time)"
    )
    parser.add_argument("--draft-seconds", type=float, help="of distilling (default: 0.115 of the time)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile layers when training on a GPU"
    )
    parser.add_argument("--prompts", type=Path, help="JSON lines with a `prompt` field, such as HumanEval.jsonl.gz")
    parser.add_argument("--limit", type=int, default=164, help="prompts at most (default 164)")
    parser.add_argument("--max-new-tokens", type=int, help="default 256 on a GPU, else 64")
    parser.add_argument("--peer-prompts", type=int, help="prompts for transformers; default 8 on a GPU, else 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--update-readme", action="store_true", help="only write what a run left in --out into bench/README.md"
    )
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    options.gpu, options.device = device.type == "cuda", str(device)
    defaults = {"preset": ("gpt2-large", "embedded-cpu"), "max_new_tokens": (256, 64), "peer_prompts": (8, 2)}
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if options.gpu else on_cpu)
    for name in (
        "minutes",
        "target_seconds",
        "pretraining_seconds",
        "draft_seconds",
        "limit",
        "max_new_tokens",
        "peer_prompts",
    ):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.prompts is not None:
        read_prompts(options.prompts)  # refused now, not after training
    recipe.preset(options.preset)
    return options


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not options.update_readme:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.prompts is not None:  # so that commands in the reports name no place of this machine
            kept = options.out / options.prompts.name
            if not kept.exists():
                shutil.copyfile(options.prompts, kept)
            options.prompts = Path(kept.name)
    before = Path.cwd()
    os.chdir(options.out)
    try:
        return to_readme() if options.update_readme else run(options)
    finally:
        os.chdir(before)


def to_readme() -> int:
    """Writes what a run left in the current folder into bench/README.md."""
    text, found = readme_part(summary(State.read(Path("state.json"))))
    update_readme(README_PART, text, found, prefix=f"{README_PART}-")
    return 0


def run(options: argparse.Namespace) -> int:
    """All stages, in the current folder. Returns the exit status."""
    quiet_transformers()
    path = Path("state.json")
    state = State.load(path, options.minutes)
    if state.spent:
        print(f"goes on: it was {state}, {state.left:.0f} s are left", flush=True)
    ended, home = threading.Event(), Path.cwd()

    def keep() -> None:
        while not ended.wait(3):
            state.save(home / path)

    def stop(*_: object) -> None:
        raise Interrupted

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, stop)
    same = True
    try:
        stages: dict[str, Callable[[float], Any]] = {
            "train": lambda _: train(options, state.training, lambda at: setattr(state, "at", at))
        }
        for name, work in (stages | later_stages(options)).items():
            if name in state.done:
                continue
            weights = [weight for stage, weight in LATER.items() if stage not in state.done]
            left = state.left - IN_HAND * 60 * state.minutes
            seconds = max(LEAST, left * LATER.get(name, 1) / max(1, sum(weights)))
            state.stage, state.at = name, None
            began = time.perf_counter()
            share = f", {seconds:.0f} s are its share" * (name in LATER)
            print(f"== {name}: {state.left:.0f} s are left{share}", flush=True)
            try:
                same &= work(seconds) is not False
            except (ValueError, RuntimeError, OSError) as error:
                state.failed[name] = " ".join(str(error).split())[:500]
                print(f"{name} failed: {state.failed[name]}", file=sys.stderr, flush=True)
                if name == "train":
                    break
            else:
                state.done[name] = taken = time.perf_counter() - began
                late = f", {taken - seconds:.0f} s more than its share: later stages have less"
                print(f"== {name} took {taken:.0f} s" + late * (name in LATER and taken > seconds), flush=True)
            state.save(path)
            write_text(Path("summary.md"), summary(state))
            gc.collect()
            if options.gpu:
                torch.cuda.empty_cache()
        state.stage = "the end"
    except KeyboardInterrupt:
        state.save(path)
        print(f"ended {state}; the same command goes on", flush=True)
        return 130
    finally:
        ended.set()
        keeper.join()
        state.save(path)
        write_text(Path("summary.md"), summary(state))
    print(f"{options.out}/summary.md has everything; {state}", flush=True)
    return 0 if same and not state.failed else 1


if __name__ == "__main__":
    sys.exit(main())
