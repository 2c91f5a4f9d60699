"""How often one of a node's children is accepted: our coupled rule against three others, on a real target and draft.

    python bench/acceptance.py [--target T --draft D] [--prompts FILE.jsonl[.gz]] [--temperatures 0.3 0.6 1 1.5]

At every position of text that the target writes at a temperature, each rule (bench/rules.py) drafts up to 8 children
from the draft's distribution and accepts one or none by the target's. See bench/README.md.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

import figures
from journal import Journal, code_fingerprint, prompt_hash
from machine import arguments_of, header, where
from report import markdown, update_readme
from rules import RULES
from sides import HERE, Models, add_options, check_options, clear_errors, encode, load
from stagedspec.cli.output import progress_bar
from stagedspec.decoding.limits import MAX_BATCH
from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.reference import warp
from stagedspec.tuning.prompts import read_prompts

CHILDREN = (1, 2, 4, 8)
RESAMPLES = 4000


# ---------------------------------------------------------------- what is measured


def write(
    models: Models, prompts: list[torch.Tensor], new_tokens: int, sampling: dict, seed: int
) -> list[torch.Tensor]:
    """Each prompt with the target's continuation, LongTensors [prompt + new]."""
    texts = []
    for start in range(0, len(prompts), MAX_BATCH):
        some = [prompt[0] for prompt in prompts[start : start + MAX_BATCH]]
        width = max(map(len, some))
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in some])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in some])
        out = models.decoder.generate(
            ids, mask, new_tokens, mode="autoregressive", do_sample=True, seed=seed + start, eos_token_id=[], **sampling
        )
        texts += [row[width - len(prompt) :] for row, prompt in zip(out, some, strict=True)]
    return texts


@torch.inference_mode()
def distributions(models: Models, text: torch.Tensor, start: int, sampling: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions [N, K] of the target and the draft at each token of `text` from position `start` on.

    Over the K tokens that either of them can choose; the rules use no others.
    """
    found = []
    for model in (models.target, models.draft):
        logits = model(text[None].to(model.device)).logits[0, start - 1 : -1].float().cpu()
        found.append(warp(logits, sampling["temperature"], sampling["top_k"], None, None).softmax(-1))
    seen = (found[0] > 0) | (found[1] > 0)
    columns = seen.float().topk(int(seen.sum(-1).max()), -1).indices
    return found[0].gather(-1, columns), found[1].gather(-1, columns)


def acceptance(p: torch.Tensor, q: torch.Tensor, draws: int, seed: int) -> dict[str, list[float]]:
    """For every rule the acceptance with CHILDREN children, the mean over the rows of p and q and `draws` draws.

    All rules draw with the same seed: where two are the same rule, they give the same numbers.
    """
    p, q = p.repeat(draws, 1), q.repeat(draws, 1)
    picked = [m - 1 for m in CHILDREN]
    return {
        name: rule(p, q, CHILDREN[-1], torch.Generator().manual_seed(seed)).accepted.double().mean(0)[picked].tolist()
        for name, rule in RULES.items()
    }


def measure(models: Models, prompts: list, temperature: float, options: argparse.Namespace) -> dict:
    """One temperature: for every rule the acceptance [prompts][CHILDREN], and the mean distance of the models."""
    sampling = {"temperature": temperature, "top_k": options.top_k}
    texts = write(models, prompts, options.max_new_tokens, sampling, options.seed)
    found: dict[str, list] = {name: [] for name in RULES}
    distance, entropy = 0.0, 0.0
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        p, q = distributions(models, text, prompt.shape[1], sampling)
        for name, values in acceptance(p, q, options.draws, options.seed + index).items():
            found[name].append(values)
        distance += float((p - q).clamp(min=0).sum(-1).mean()) / len(prompts)
        entropy += float(-torch.xlogy(p, p).sum(-1).mean()) / len(prompts)
    return {"temperature": temperature, "accepted": found, "distance": distance, "entropy": entropy}


def summarise(measured: dict) -> dict:
    """Means over prompts with 95% intervals, of each rule and of the coupled rule's gain over recursive rejection.

    The intervals come from resampling prompts, because positions of one text are not independent.
    """
    values = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in measured["accepted"].items()}
    rules = {name: interval(rows) for name, rows in values.items()}
    difference = interval(values["coupled"] - values["recursive"])
    kept = {key: measured[key] for key in ("temperature", "distance", "entropy")}
    return kept | {"rules": rules, "difference": difference}


def interval(values: torch.Tensor) -> list[dict[str, float]]:
    """The mean over the rows of [P, C] and its 95% bootstrap interval, for every column."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), 0)
    bounds = zip(values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [{"mean": mean, "low": below, "high": above} for mean, below, above in bounds]


# ---------------------------------------------------------------- the report


def table(entries: list[dict]) -> str:
    """Acceptance in percent, the best rule of each line marked with *, and what ours gains or loses."""
    headings = ["T", "children", *RULES, "coupled less recursive", ""]
    lines = []
    for entry in entries:
        for column, m in enumerate(CHILDREN):
            means = {name: entry["rules"][name][column] for name in RULES}
            best = max(round(point["mean"], 3) for point in means.values())
            gap = entry["difference"][column]
            verdict = "ours better" if gap["low"] > 0 else "ours worse" if gap["high"] < 0 else "no difference seen"
            cells = [
                f"{'*' * (round(p['mean'], 3) == best)}{100 * p['mean']:.1f} ±{50 * (p['high'] - p['low']):.1f}"
                for p in means.values()
            ]
            shown = f"{100 * gap['mean']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            lines.append([f"{entry['temperature']:g}", str(m), *cells, shown, verdict])
    return markdown(headings, lines)


def summary(report: dict) -> str:
    """The part of bench/README.md that this script writes."""
    settings, prompts = report["settings"], report["prompts"]
    models = "; ".join(
        f"T={entry['temperature']:g}: entropy {entry['entropy']:.2f} nats, total variation {entry['distance']:.2f}"
        for entry in report["temperatures"]
    )
    return "\n\n".join([
        f"`{report['command']}`  \n{where(report)}  \n{prompts['used']} prompts of `{prompts['file']}`, "
        f"{settings['max_new_tokens']} positions each, {settings['draws']} draws each, top-k {settings['top_k']}. "
        f"Target against draft: {models}.",
        table(report["temperatures"]),
        "![Acceptance by number of children and temperature](figures/acceptance.svg)",
    ])  # fmt: skip


# ---------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=96, max_new_tokens=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.6, 1.0, 1.5])
    parser.add_argument("--draws", type=int, default=16, help="of every rule at every position (default 16)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further temperature after so long")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "acceptance", help="folder to write to")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured before")
    parser.add_argument("--update-readme", action="store_true", help="also write bench/README.md and bench/figures/")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    for temperature in options.temperatures:
        if not 1e-6 <= temperature <= 1e6:
            parser.error(f"--temperatures must be above 0, got {temperature}")
    return options


def bench(options: argparse.Namespace, arguments: list[str], console: Console) -> bool:
    """Measures, writes and prints everything; returns True. Raises ValueError for bad input."""
    began = time.perf_counter()
    prompts = read_prompts(options.prompts)
    models = load(options)
    if models.draft is None:
        raise ValueError("acceptance is of a draft's tokens: give --draft")
    room = models.positions - options.max_new_tokens
    encoded, skipped = encode(prompts, models.tokenizer, room, options.limit)
    console.print(f"{len(encoded)} prompts, {skipped} skipped: empty, or longer than {room} tokens", highlight=False)
    report = header("acceptance.py", arguments, models.decoder.device) | {
        "prompts": {"file": options.prompts.name, "used": len(encoded), "skipped": skipped},
        "settings": {key: getattr(options, key) for key in ("max_new_tokens", "dtype", "seed", "top_k", "draws")},
    }
    key = {"settings": report["settings"], "prompts": [prompt_hash(prompt) for prompt in encoded]}
    rules = (HERE / "rules.py").read_text(encoding="utf-8")
    key |= {"models": models.fingerprint(), "code": code_fingerprint(), "rules": rules}
    journal = Journal(options.out / "runs.jsonl", key, options.fresh)
    done = {entry["temperature"]: entry for entry in journal.entries}
    with progress_bar() as progress:
        for temperature in progress.track(options.temperatures, description="temperatures"):
            if temperature not in done:
                if done and time.perf_counter() - began > options.seconds:
                    console.print(f"left out, time is over: T={temperature:g}", highlight=False)
                    continue
                done[temperature] = measure(models, encoded, temperature, options)
                journal.add(**done[temperature])
    report["children"] = CHILDREN
    report["temperatures"] = [
        summarise(done[temperature]) for temperature in options.temperatures if temperature in done
    ]

    written = figures.acceptance(report, options.out / "acceptance")
    text = summary(report)
    write_text(options.out / "acceptance.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "acceptance.md", text.replace("figures/", "") + "\n")
    console.print(f"{table(report['temperatures'])}\n\n{report['command']}\n{where(report)}\nwritten to {options.out}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    if options.update_readme:
        update_readme("acceptance", text, [path for path in written if path.suffix != ".png"])
    return True


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = arguments_of(arguments)
    bench(parse(arguments), arguments, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
