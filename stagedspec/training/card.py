"""The model card of an export: what was trained, on what, how long, and how good it is."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from stagedspec.training.sources import source_folder
from stagedspec.training.state import position_of


def source_line(source: str) -> str:
    """Name, version and licence of a source, never its place on this machine."""
    if source == "stdlib":
        return f"The Python standard library {platform.python_version()} (PSF-2.0)"
    if Path(source).expanduser().is_dir():
        return f"The folder `{Path(source).expanduser().resolve().name}` (licence: see there)"
    names = _distributions().get(source)
    if names:
        found = metadata.metadata(names[0])
        return f"{found['Name']} {found['Version']} ({_licence(found)})"
    if source in sys.stdlib_module_names:
        return f"The Python standard library {platform.python_version()}, package `{source}` (PSF-2.0)"
    return f"{source_folder(source).name} (licence: see there)"


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Import names to the distributions they come from: reading what is installed takes a second."""
    return metadata.packages_distributions()


def _licence(found: Any) -> str:  # Any: `PackageMetadata` declares `get` only from Python 3.12 on
    if found.get("License-Expression"):
        return found["License-Expression"]
    classified = [line.split("::")[-1].strip() for line in found.get_all("Classifier", []) if "License ::" in line]
    if classified:
        return ", ".join(classified)
    return (found.get("License") or "licence not stated").strip().splitlines()[0]


def stage_seconds(path: Path, tokens_per_step: int | None = None) -> float | None:
    """Time spent in a stage, all its runs together, from its log; None without a log."""
    if not path.exists():
        return None
    total = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off when the run was killed
        if "seconds" in values:
            total += values["seconds"]
        elif tokens_per_step and values.get("tokens_per_second"):
            total += tokens_per_step / values["tokens_per_second"]
    return total


def trained_tokens(fit: dict, folder: Path) -> int:
    """Tokens that a training saw: with a budget of seconds, those of the steps that its checkpoint counts."""
    return fit["tokens"] if fit["seconds"] is None else position_of(folder).step * fit["batch"] * fit["block"]


def sampled_tokens(config: dict, name: str, out: Path) -> int:
    """Tokens in the shards of a model's samples, which are fewer than wanted where sampling had a budget of seconds."""
    shards = len(list((out / f"{name}-samples").glob("shard-*.safetensors")))
    return shards * config[f"{name}_rows"] * config[f"{name}_length"]


def model_card(config: dict, preset: str | None, out: Path, stages: Sequence[str], measured: dict) -> str:
    """The card as Markdown.

    config: TrainConfig as a dict; preset: its name, if it is one; measured: parameters, held-out figures, acceptance.
    """
    target, draft, acceptance = measured["target"], measured["draft"], measured["acceptance"]
    ratio = target["parameters"] / draft["parameters"]
    assets = out / "assets"
    sizes = {
        name: (assets / name).stat().st_size / 1e6
        for name in ("target/model.safetensors", "draft/model.safetensors", "ngram.safetensors")
    }
    sampled = {name: sampled_tokens(config, name, out) for name in ("target", "draft")}
    total = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 1e6
    device = torch.device("cuda" if torch.cuda.is_available() and config["device"] != "cpu" else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    command = f"`stagedspec train --preset {preset}`" if preset else "`stagedspec train` with the settings below"
    cut = "" if config["target_top_k"] is None else f", top-k {config['target_top_k']}"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [gpt2, code, python, speculative-decoding]",
        "---",
        "",
        "# Target, draft and n-gram for staged speculative decoding",
        "",
        "Three models of Python source for lossless staged speculative decoding (arXiv 2308.04623): a GPT-2 target, a"
        f" draft {ratio:.1f} times smaller distilled from it, and a Katz trigram table fitted on the draft's samples."
        " They show the decoder at work; they are far too small to be relied on for code.",
        "",
        "## Models",
        "",
        "| | layers x width x heads | parameters | file, MB | held-out loss, nats a token | held-out bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in (("target", target), ("draft", draft)):
        shape = config[name]
        lines.append(
            f"| {name} | {shape['layers']} x {shape['width']} x {shape['heads']} | {values['parameters']:,} | "
            f"{sizes[f'{name}/model.safetensors']:.2f} | {values['heldout_loss']:.3f} | {values['heldout_bpb']:.3f} |"
        )
    lines += [
        f"| n-gram | {config['ngram_contexts']:,} contexts at most x {config['ngram_successors']} successors | | "
        f"{sizes['ngram.safetensors']:.2f} | | |",
        "",
        f"Float16 safetensors, {total:.1f} MB in all. Byte-level BPE of {config['vocab_size']:,} tokens (id 0 ends a"
        f" text), {config['n_positions']} positions. The held-out figures are of these half-precision weights.",
        "",
        "Draft against target on held-out text: the same first choice at"
        f" {acceptance['agreement']:.1%} of positions, the target's first choice among the draft's first four at"
        f" {acceptance['top4']:.1%}, overlap of the distributions at temperature 1{cut} (one minus total variation)"
        f" {acceptance['overlap']:.1%}, KL {acceptance['kl']:.3f} nats.",
        "",
        "## Data",
        "",
        "Python files of the following, without tests, vendored copies and duplicates; one file in fifty is held out.",
        "",
        *(f"- {line}" for line in _sources(config, out)),
        "",
        f"The draft saw {config['sample_share']:.0%} samples of the target ({sampled['target']:,} tokens, at"
        f" temperatures {', '.join(map(str, config['target_temperatures']))}{cut}) and {1 - config['sample_share']:.0%}"
        f" corpus. The n-gram was fitted on {sampled['draft']:,} tokens of the draft at temperature"
        f" {config['draft_temperature']}. A sampled row begins with up to {config['longest_prompt']} tokens of the"
        " training corpus.",
        "",
        "## Training",
        "",
        f"Made by {command}, on: {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python"
        f" {platform.python_version()}. The seconds are those of all runs of a stage together.",
        "",
        "| stage | tokens | seconds |",
        "|---|---|---|",
    ]
    tokens = {
        stage: trained_tokens(config[f"{stage}_fit"], out / stage) for stage in stages if config.get(f"{stage}_fit")
    }
    tokens |= {f"{name}-samples": count for name, count in sampled.items()}
    for stage in stages:
        fit = config.get(f"{stage}_fit")
        seconds = stage_seconds(out / f"{stage}.jsonl", fit and fit["batch"] * fit["block"])
        shown = "not recorded" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {stage} | {tokens.get(stage, '')} | {shown} |")
    settings = {key: value for key, value in config.items() if key not in ("sources", "device")}
    lines += ["", "```json", json.dumps(settings, indent=1), "```", ""]
    return "\n".join(lines)


def _sources(config: dict, out: Path) -> list[str]:
    """The sources as they were when the corpus was made, or, where that was not logged, as they are installed now."""
    path = out / "corpus.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "sources" in values:
                return values["sources"]
    return [source_line(source) for source in config["sources"]]
