"""`stagedspec warm-up`: compile and measure before the first generation."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from stagedspec.cli import early_checks
from stagedspec.cli.options import Backend, Device, Draft, Dtype, Mode, Ngram, Target, Tree, load_decoder
from stagedspec.cli.output import progress_bar

if TYPE_CHECKING:
    from rich.progress import TaskID

EXAMPLES = (
    "Examples: [bold]stagedspec warm-up --target gpt2-large --draft distilgpt2[/bold] when a container image is "
    "built; [bold]stagedspec warm-up --mode staged --batch 1 --batch 8 --tokens 512[/bold] for what a service uses."
)


def warm_up(
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Mode; may be given several times. Default: all that the models allow.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Batch size; may be given several times. Default: 1.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Longest prompt and its new tokens together. Default: the model's positions.")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="Prepare greedy decoding.", rich_help_panel="Sampling")] = True,
    sample: Annotated[bool, typer.Option(help="Prepare sampling.", rich_help_panel="Sampling")] = True,
    temperature: Annotated[float | None, typer.Option(help="Above 0; default 1.", rich_help_panel="Sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", rich_help_panel="Sampling")] = 50,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel="Sampling")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.", rich_help_panel="Sampling")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    tree: Tree = None,
) -> None:
    """Compile the kernels and measure the pass times that the first generations on this GPU would wait for.

    Both are kept for later runs: in Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache) and in the user's cache
    folder (XDG_CACHE_HOME, else ~/.cache). Run it on the GPU that will be used, or on one of the same kind.
    After an interruption, the same command continues.
    """
    if not greedy and not sample:
        raise ValueError("nothing to prepare: leave out --no-greedy or --no-sample")
    early_checks.check_at_least(2, tokens=tokens)
    sampled = early_checks.check_sampling(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    early_checks.check_device(device, backend)
    if backend == "torch":
        raise ValueError("warm-up prepares GPU kernels, but backend torch has none; leave out --backend")
    if backend != "triton":
        early_checks.check_gpu("warm-up", device)
    wanted = () if mode is None else tuple(one.value for one in mode)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, tree, wanted, text=False)
    begin = time.perf_counter()
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def report(name: str, ready: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name)
            progress.update(tasks[name], completed=ready, total=total)

        made = decoder.warm_up(
            None if mode is None else [one.value for one in mode],
            [{}] * greedy + [sampled] * sample,
            batch or [1],
            tokens,
            report,
        )
    typer.echo(f"ready: {made} kernels compiled or loaded in {time.perf_counter() - begin:.1f} s")
