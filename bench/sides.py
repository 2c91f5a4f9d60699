"""Code shared by the benchmarks: options, prompts, models, and the sides of a comparison."""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

import stagedspec
from journal import Journal
from machine import arguments_of, header, where
from stagedspec.cli.output import progress_bar, quiet_transformers
from stagedspec.kernels.common.files import write_text
from stagedspec.models import embedded
from stagedspec.models.loading import check_same_tokens, load_tokenizer, read_checkpoint
from stagedspec.tuning import compare
from stagedspec.tuning.compare import Run, Timed

HERE = Path(__file__).parent
BASELINE = "autoregressive"
PLAIN, ASSISTED, LOOKUP = "transformers", "transformers assisted", "transformers lookup"
STATIC = "transformers static"  # a static cache and torch.compile


# ---------------------------------------------------------------- options


def add_options(parser: argparse.ArgumentParser, limit: int, max_new_tokens: int) -> None:
    """Adds the options of all benchmarks: models, prompts, lengths."""
    parser.add_argument("--target", help="hub id or folder; default: the embedded target, draft and n-gram table")
    parser.add_argument("--draft", help="hub id or folder of the draft")
    parser.add_argument("--ngram", type=Path, help="n-gram table")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl", help="JSON lines with a `prompt` field")
    parser.add_argument("--limit", type=int, default=limit, help=f"prompts at most (default {limit})")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"(default {max_new_tokens})")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of all sides (default float32)")
    parser.add_argument("--backend", default="auto")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a message if a number is not positive that must be."""
    names = ("limit", "max_new_tokens", "repeats", "threads", "batch", "prompt_tokens", "warm_up", "steps")
    for name in (*names, "peer_prompts", "mean"):
        value = getattr(options, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                parser.error(f"--{name.replace('_', '-')} must be positive, got {number}")


def clear_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Turns ValueError and OSError into one line on stderr and exit status 2; Ctrl-C into status 130."""

    @functools.wraps(main)
    def wrapped(*arguments) -> int:
        try:
            return main(*arguments)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130

    return wrapped


def run_command(
    script: str,
    parse: Callable[[list[str]], argparse.Namespace],
    bench: Callable[[argparse.Namespace, Console], dict],
    arguments: list[str] | None,
) -> dict:
    """Runs a benchmark as a command: prints how it was called and where, writes its report to --out, and returns it.

    bench: its report names the `device`. Raises ValueError for an --out in a folder that does not exist.
    """
    arguments = arguments_of(arguments)
    options, console = parse(arguments), Console()
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out: the folder {options.out.parent} does not exist")
    report = bench(options, console)
    report = header(script, arguments, report.pop("device")) | report
    if options.out is not None:
        write_text(options.out, json.dumps(report, indent=1) + "\n")
    console.print(f"{report['command']}\n{where(report)}", highlight=False, soft_wrap=True)
    return report


# ---------------------------------------------------------------- prompts


def encode(prompts: list[str], tokenizer, room: int, limit: int) -> tuple[list[torch.Tensor], int]:
    """The first `limit` prompts of 1 to `room` tokens as LongTensors [1, L], and the number of prompts skipped.

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


def batches(encoded: list[torch.Tensor], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts [1, L] in batches: left-padded ids [size, longest] and their mask. An incomplete batch is dropped.

    Raises ValueError for fewer prompts than one batch takes.
    """
    if len(encoded) < size:
        raise ValueError(f"a batch of {size} needs as many prompts, got {len(encoded)}; raise --limit")
    found = []
    for start in range(0, len(encoded) - size + 1, size):
        prompts = encoded[start : start + size]
        width = max(ids.shape[1] for ids in prompts)
        ids, mask = (torch.zeros(size, width, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, width - prompt.shape[1] :] = prompt
            mask[row, width - prompt.shape[1] :] = 1
        found.append((ids, mask))
    return found


# ---------------------------------------------------------------- models


@dataclass
class Models:
    """A target, and a draft if there is one: as our decoder, and as transformers models.

    Neither stops at an end-of-text token: every side is to write max_new_tokens.
    passes: forward calls of the transformers models within the last `counted`.
    """

    decoder: stagedspec.Decoder
    target: GPT2LMHeadModel
    draft: GPT2LMHeadModel | None
    tokenizer: PreTrainedTokenizerBase
    passes: dict[str, int] = field(default_factory=lambda: {"target": 0, "draft": 0})

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts passes within. Hooks stay on no longer: they would be compiled, and again at every count."""
        models = (
            (name, model) for name, model in (("target", self.target), ("draft", self.draft)) if model is not None
        )
        hooks = [
            model.register_forward_pre_hook(functools.partial(_count, self.passes, name)) for name, model in models
        ]
        self.passes.update(target=0, draft=0)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def positions(self) -> int:
        """Positions that both models have. Our decoder can go past the draft's last one, transformers cannot."""
        return min(model.config.n_positions for model in (self.target, self.draft) if model is not None)

    def fingerprint(self) -> str:
        """A hash of all weights, so that results of other models are not reused."""
        found = hashlib.sha256()
        for model in (self.target, self.draft):
            for name, weight in sorted(model.state_dict().items()) if model is not None else ():
                found.update(name.encode() + weight.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        table = self.decoder.ngram
        for part in () if table is None else (table.keys, table.tokens, table.logprobs):
            found.update(part.contiguous().cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def load(options: argparse.Namespace) -> Models:
    """Loads the models that the options name, by default the embedded models.

    Raises ValueError for whatever is missing, damaged or does not fit together.
    """
    if not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {options.dtype!r}")
    if options.threads:
        torch.set_num_threads(options.threads)
    quiet_transformers()
    if options.target is None and (options.draft or options.ngram):
        raise ValueError("--draft and --ngram belong to a target: add --target")
    sources = options.target, options.draft, options.ngram
    if options.target is None:
        embedded.check_installed("name some with --target, --draft and --ngram")
        sources = str(embedded.TARGET), str(embedded.DRAFT), embedded.NGRAM
    tokenizer = load_tokenizer(sources[0])
    if tokenizer is None:
        raise ValueError(f"{sources[0]} has no tokenizer, so prompts cannot be turned into tokens")
    target = _read(sources[0], "target", options.dtype)
    draft = None
    if sources[1] is not None:
        check_same_tokens(tokenizer, load_tokenizer(sources[1]))
        draft = _read(sources[1], "draft", options.dtype)
        if getattr(options, "random_draft", False):
            torch.manual_seed(0)
            draft = GPT2LMHeadModel(draft.config).to(draft.dtype).eval()
            draft.generation_config.eos_token_id = None
    # Of copies that are gone at once: a decoder looks at model objects at every call, and refuses those with hooks.
    decoder = stagedspec.Decoder.from_pretrained(
        *copy.deepcopy((target, draft)), sources[2], tokenizer, device=options.device, dtype=options.dtype,
        backend=options.backend, tree=getattr(options, "tree", None),
    )  # fmt: skip
    for model in (target, draft):
        if model is not None:
            model.to(decoder.device)
    return Models(decoder, target, draft, tokenizer)


def _read(source: str, role: str, dtype: str) -> GPT2LMHeadModel:
    model = read_checkpoint(source, role).to(getattr(torch, dtype)).eval()
    # `generate` fills an unset eos_token_id from here.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def _count(passes: dict[str, int], name: str, *_: object) -> None:
    passes[name] += 1


# ---------------------------------------------------------------- sides


def our_side(decoder: stagedspec.Decoder, mode: str, settings: dict):
    """Our decoder in one mode, as a side of `compare`. Steps are counted for the whole batch."""

    def run(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Run:
        output = decoder.generate(ids, mask, mode=mode, eos_token_id=[], **settings)
        stats = decoder.last_stats.as_dict()
        return Run(output[:, ids.shape[1] :].flatten().tolist(), stats | {"steps": stats["row_steps"]})

    return run


def transformers_side(models: Models, settings: dict, kind: str = PLAIN):
    """transformers `generate` with its KV cache, as a side of `compare`: alone, with the draft as assistant, with
    prompt lookup, or compiled with a static cache (on a GPU). Steps are the target's forward passes, counted for each
    row."""
    settings = dict(settings)
    seed = settings.pop("seed")
    if settings["do_sample"]:
        settings["top_k"] = settings["top_k"] or 0
    more = {ASSISTED: {"assistant_model": models.draft}, LOOKUP: {"prompt_lookup_num_tokens": 10}}.get(kind, {})
    if kind == STATIC:
        settings["cache_implementation"] = "static"
    config = transformers.GenerationConfig(**settings, use_cache=True, pad_token_id=0)
    target, draft = models.decoder.target, models.decoder.draft
    ratio = 0.0 if draft is None else draft.weight_bytes / target.weight_bytes

    def run(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Run:
        ids = ids.to(models.target.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        torch.manual_seed(seed)
        first = FirstToken()
        streamer = {"streamer": first} if len(ids) == 1 else {}  # a streamer takes no batches
        with torch.inference_mode(), contextlib.nullcontext() if kind == STATIC else models.counted():
            output = models.target.generate(ids, attention_mask=mask, generation_config=config, **more, **streamer)
        tokens = output[:, ids.shape[1] :].flatten().tolist()
        passes, drafted, rows = models.passes["target"], models.passes["draft"], len(ids)
        if kind == STATIC:
            passes, drafted = output.shape[1] - ids.shape[1], 0
        stats = {"steps": passes * rows, "target_passes": passes, "draft_passes": drafted}
        stats["seconds_to_first_token"] = first.seconds
        bytes_read = (passes + drafted * ratio) * rows / max(1, len(tokens))
        return Run(tokens, stats | {"weight_bytes_per_token": bytes_read})

    return run


class FirstToken:
    """A streamer of transformers that notes when the first token comes. seconds: since it was made; None before."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._began, self._calls = time.perf_counter(), 0

    def put(self, _: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call hands over the prompt
            self.seconds = time.perf_counter() - self._began

    def end(self) -> None:
        """Nothing is kept back."""


def measure(
    sides: dict,
    prompts: list[torch.Tensor],
    repeats: int,
    title: str,
    journal: Journal | None = None,
    until: float = math.inf,
) -> list[Timed]:
    """Warms up every side, then runs all on all prompts, except for runs that the journal already holds.

    until: as of `compare.measure`. Warmed up with the longest prompt: a static cache is made for it.
    """
    done = {} if journal is None else journal.rounds(title, list(sides), prompts)
    rounds = len(prompts) * repeats
    missing = rounds - sum(repeat < repeats and index < len(prompts) for repeat, index in done)
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(title, total=len(sides) * (missing + 1) if missing else 1)

        def on_run(timed: Timed) -> None:
            if journal is not None:
                journal.add_run(title, timed, prompts[timed.prompt])
            progress.update(task, advance=1, refresh=True)

        for side in sides.values() if missing else ():
            side(max(prompts, key=_length))
            progress.update(task, advance=1, refresh=True)
        return compare.measure(sides, prompts, repeats, on_run, done, until)


def _length(prompt: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> int:
    """Tokens of a prompt [1, L], or of a batch with its mask."""
    return (prompt if isinstance(prompt, torch.Tensor) else prompt[0]).shape[1]
