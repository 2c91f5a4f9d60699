"""Times the decoding modes side by side, beside transformers `generate`, at batch 1.

    python bench/decode.py [--prompts FILE.jsonl[.gz]] [--limit 32] [--max-new-tokens 128] [--sampling both]

The sides alternate on every prompt; all have the same weights and dtype. Every output is compared token by token with
the autoregressive mode's, and a side whose output differs gets no ratio. See bench/README.md.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer, GPT2LMHeadModel

import stagedspec
from stagedspec.cli import progress_bar, quiet_transformers
from stagedspec.compare import Row, Run, compare, table

HERE = Path(__file__).parent
EMBEDDED = Path(stagedspec.__file__).parent / "assets" / "target"
BASELINE = "autoregressive"


def read_prompts(path: Path) -> list[str]:
    """The `prompt` fields of a file of JSON lines, gzipped if its name ends in .gz.

    Raises ValueError for a file that is missing, unreadable, empty, or has a line without a prompt text.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}; bench/make_prompts.py writes them") from None
    if not lines:
        raise ValueError(f"{path} holds no prompts; expected JSON lines with a `prompt` field")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{path}, line {number}: expected a JSON object with a text in its `prompt` field")
        prompts.append(prompt)
    return prompts


def encode(prompts: list[str], tokenizer, room: int, limit: int) -> tuple[list[torch.Tensor], int]:
    """The first `limit` prompts of at most `room` tokens as LongTensors [1, L], and how many were skipped as too long.

    Raises ValueError if none is left.
    """
    encoded, skipped = [], 0
    for prompt in prompts:
        if len(encoded) == limit:
            break
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if 0 < len(ids) <= room:
            encoded.append(torch.tensor([ids]))
        else:
            skipped += 1
    if not encoded:
        raise ValueError(f"none of the {len(prompts)} prompts has 1 to {room} tokens; lower --max-new-tokens")
    return encoded, skipped


def our_side(decoder, mode: str, settings: dict):
    """Our decoder in one mode, as a side of `compare`."""

    def run(ids: torch.Tensor) -> Run:
        output = decoder.generate(ids, mode=mode, eos_token_id=[], **settings)
        return Run(output[0, ids.shape[1] :].tolist(), decoder.last_stats.as_dict())

    return run


def transformers_side(model: GPT2LMHeadModel, settings: dict):
    """transformers `generate` with its key-value cache, as a side of `compare`."""
    settings = dict(settings)
    seed = settings.pop("seed")
    if settings["do_sample"]:
        settings["top_k"] = settings["top_k"] or 0
    config = transformers.GenerationConfig(**settings, use_cache=True, pad_token_id=0)

    def run(ids: torch.Tensor) -> Run:
        ids = ids.to(model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return Run(output[0, ids.shape[1] :].tolist())

    return run


def measure(sides: dict, prompts: list[torch.Tensor], repeats: int, title: str, incomparable: frozenset) -> dict:
    """Warms every side up, compares them, and gives {"rows": [Row], "runs": [each run]}."""
    runs = []
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(title, total=len(sides) * (len(prompts) * repeats + 1))

        def on_run(name: str, index: int, run: Run, seconds: float) -> None:
            runs.append({"side": name, "prompt": index, "new_tokens": len(run.tokens), "seconds": seconds})
            progress.update(task, advance=1, refresh=True)

        for side in sides.values():
            side(prompts[0])
            progress.update(task, advance=1, refresh=True)
        rows = compare(sides, prompts, repeats, incomparable, on_run)
    return {"rows": rows, "runs": runs}


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)
    found = {
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict:
    """Versions of what takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "stagedspec"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="hub id or folder; default: the embedded trio")
    parser.add_argument("--draft", help="hub id or folder of the draft")
    parser.add_argument("--ngram", type=Path, help="n-gram table")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl", help="JSON lines with a `prompt` field")
    parser.add_argument("--limit", type=int, default=32, help="prompts at most (default 32)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--modes", nargs="+", choices=stagedspec.MODES, default=list(stagedspec.MODES))
    parser.add_argument("--sampling", choices=("greedy", "sample", "both"), default="both")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs of every side on every prompt")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of all sides (default float32)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="write results as JSON")
    options = parser.parse_args(arguments)
    for name in ("limit", "max_new_tokens", "repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return options


def bench(options: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """Runs the benchmark; gives the results and whether all comparable outputs were identical.

    Raises ValueError for prompts or models that cannot be used.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    prompts = read_prompts(options.prompts)
    quiet_transformers()
    common = {"device": options.device, "dtype": options.dtype, "backend": options.backend}
    if options.target is None:
        if options.draft or options.ngram:
            raise ValueError("--draft and --ngram belong to a target: add --target")
        decoder = stagedspec.Decoder.default(**common)
    else:
        decoder = stagedspec.Decoder.from_pretrained(options.target, options.draft, options.ngram, **common)
    source = options.target or str(EMBEDDED)
    tokenizer = decoder.tokenizer or AutoTokenizer.from_pretrained(source)
    model = GPT2LMHeadModel.from_pretrained(source, dtype=getattr(torch, options.dtype)).eval()
    # `generate` fills an unset eos_token_id from here; every side is to write max_new_tokens.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    room = model.config.n_positions - options.max_new_tokens
    encoded, skipped = encode(prompts, tokenizer, room, options.limit)
    console.print(f"{len(encoded)} prompts, {skipped} skipped: empty, or longer than {room} tokens", highlight=False)

    samplings = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k},
    }
    chosen = list(samplings) if options.sampling == "both" else [options.sampling]
    modes = [BASELINE, *(mode for mode in options.modes if mode != BASELINE)]
    model = model.to(decoder.device) if options.transformers else None
    results, same = {}, True
    for name in chosen:
        settings = {"max_new_tokens": options.max_new_tokens, "seed": options.seed, **samplings[name]}
        sides = {mode: our_side(decoder, mode, settings) for mode in modes}
        if model is not None:
            sides["transformers"] = transformers_side(model, settings)
        # Sampled, transformers draws other random numbers: its tokens are not expected to be ours.
        incomparable = frozenset({"transformers"} if name == "sample" else ())
        measured = measure(sides, encoded, options.repeats, name, incomparable)
        rows: list[Row] = measured["rows"]
        same = same and all(row.identical is not False for row in rows)
        console.print(table(rows, f"{name}, {options.max_new_tokens} new tokens, batch 1, {options.dtype}"))
        results[name] = {
            "settings": settings,
            "sides": [row.as_dict() for row in rows],
            "runs": measured["runs"],
        }
    report = {
        "command": f"python bench/decode.py {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "machine": machine(decoder.device),
        "prompts": {"file": options.prompts.name, "used": len(encoded), "skipped": skipped},
        "identical": same,
        "results": results,
    }
    return report, same


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    try:
        if options.out is not None and not options.out.resolve().parent.is_dir():
            raise ValueError(f"--out: the folder {options.out.parent} does not exist")
        if not isinstance(getattr(torch, options.dtype, None), torch.dtype):
            raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {options.dtype!r}")
        report, same = bench(options, console)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    found = report["machine"]
    where = found.get("gpu") or f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    packages = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    console.print(f"{report['command']}\n{where}; {packages}; {report['date']}", highlight=False, soft_wrap=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
