"""`stagedspec generate --prompts`: complete the prompts of a file into another file."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from stagedspec.cli import early_checks
from stagedspec.cli.output import preparing, progress_bar
from stagedspec.cli.prompt_file import Completions, Prompts
from stagedspec.models import checkpoints, embedded

if TYPE_CHECKING:
    from stagedspec.decoder import Completion, Decoder

# What a line has of the statistics.
STATS = ("new_tokens", "steps", "tokens_per_step", "total_seconds", "origins")


def check(
    prompts: Path, out: Path | None, field: str, id_field: str | None, text_field: str, settings: dict[str, Any]
) -> tuple[Prompts, Completions]:
    """Checks the files and reads them, before a model is loaded. settings: those that decide what is written."""
    if out is None:
        raise ValueError("--prompts needs a file for the completions: add --out")
    early_checks.check_input(prompts, "--prompts", "JSON lines")
    early_checks.check_output(out, "--out")
    prompts, out = prompts.expanduser(), out.expanduser().resolve()  # one name, whatever link leads to the file
    if out.exists() and not out.is_file():
        raise ValueError(f"--out must be a regular file, which a later run can go on with, but {out} is none")
    if out.suffix == ".gz":
        raise ValueError(f"--out is written as plain text, got {out}: leave out .gz")
    for path in Completions.files(out):
        if path.exists() and path.samefile(prompts):
            beside = "" if path == out else f": a run with --out {out} writes it too"
            raise ValueError(f"--out and --prompts are the same file, {path}{beside}; choose another --out")
    own = {"index", "sample", "seed", "finish_reason", "error", "tokens", "stats"}
    for option, name in (("--id-field", id_field), ("--text-field", text_field)):
        if name in own or (name == text_field and name == id_field):
            raise ValueError(f"{option} {name} is the name of another field of the completions")
    found = Prompts.read(prompts, field, id_field)
    target = settings["target"]
    folder = None if target is None else checkpoints.local_folder(target, "target")
    if folder is not None:
        settings = settings | {"target": str(folder.resolve())}
    fields = {"prompts": found.digest, "id_field": id_field, "text_field": text_field}
    return found, Completions(out, fields | settings)


def complete(
    load: Callable[[], "Decoder"],
    prompts: Prompts,
    out: Completions,
    id_field: str | None,
    text_field: str,
    token_ids: bool,
    stop: Sequence[str],
    num_samples: int,
    **options: Any,
) -> None:
    """Completes what is not completed yet, and closes `out`. options: of `Decoder.complete_many`."""
    with closing(out):
        total, before = num_samples * len(prompts.texts), len(out.done)
        if before >= total:
            out.sort()
            typer.echo(f"{out.path}: all {total:,} completions are there")
            return
        decoder = load()
        dtype = str(decoder.target.dtype).removeprefix("torch.")
        out.begin(
            arithmetic=f"{dtype} on {decoder.device.type}, backend {decoder.backend}",
            weights=_digest(out.settings["target"]),
        )
        tokens, rate = 0, 0.0
        skipped: set[int] = set()
        try:
            with preparing():
                decoder.tree_for(options["mode"], options["batch"], do_sample=options["do_sample"])
            found = decoder.complete_many(
                prompts.texts, num_samples=num_samples, ordered=False, skip=frozenset(out.done), **options
            )
            begin = time.perf_counter()
            with _progress() as progress, _named(prompts):
                task = progress.add_task("completing", total=total, completed=before, rate="")
                for one in found:
                    out.add(_line(one, prompts, id_field, text_field, token_ids, stop))
                    tokens += len(one.tokens)
                    if one.error is not None:
                        skipped.add(one.index)
                    rate = tokens / (time.perf_counter() - begin)
                    progress.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")
            out.sort()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(out.done):,} of {total:,} completions are in {out.path}; the same command goes on with the rest"
            ) from None
    skips = f", {len(skipped):,} prompts skipped" if skipped else ""
    typer.echo(f"{out.path}: {total - before:,} completions{skips}, {tokens:,} tokens, {rate:,.0f} tokens/s")


def _digest(target: str | None) -> str | None:
    """A name for the target's weights: other ones may have been saved to the same folder. None for a hub id that is not
    in the hub's cache."""
    folder = embedded.TARGET if target is None else checkpoints.find(target, "target")
    if folder is None:
        return None
    found = hashlib.sha256()
    for path in checkpoints.weight_files(folder):
        with path.open("rb") as file:
            while part := file.read(2**20):
                found.update(part)
    return found.hexdigest()


@contextmanager
def _named(prompts: Prompts) -> Iterator[None]:
    """Lets the decoder's warnings name prompts by their lines and ids."""

    def name(record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple) and str(record.msg).startswith("prompt %s"):
            index, *rest = record.args
            record.args = (prompts.name(int(str(index))), *rest)
        return True

    log = logging.getLogger("stagedspec")
    log.addFilter(name)
    try:
        yield
    finally:
        log.removeFilter(name)


def _progress() -> Any:
    from rich.progress import TextColumn

    return progress_bar(TextColumn("{task.fields[rate]}"))


def _line(
    one: "Completion", prompts: Prompts, id_field: str | None, text_field: str, token_ids: bool, stop: Sequence[str]
) -> dict[str, Any]:
    """What is written of a completion."""
    values: dict[str, Any] = {} if id_field is None or prompts.ids is None else {id_field: prompts.ids[one.index]}
    values |= {"index": one.index, "sample": one.sample}
    if one.seed is not None:
        values["seed"] = one.seed
    values[text_field] = before_stop(prompts.texts[one.index], one.text, stop)
    if token_ids:
        values["tokens"] = one.tokens
    values["finish_reason"] = one.finish_reason
    if one.error is not None:
        return values | {"error": one.error}
    stats = one.stats.as_dict()
    return values | {"stats": {name: stats[name] for name in STATS}}


def before_stop(prompt: str, text: str, stop: Sequence[str]) -> str:
    """The completion up to the stop string that ended it, which may have begun in the prompt."""
    end = len(text)
    for string in stop:
        first = max(0, len(prompt) - len(string) + 1)
        at = (prompt + text).find(string, first)
        if at >= 0:
            end = min(end, max(0, at - len(prompt)))
    return text[:end]
