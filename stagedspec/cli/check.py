"""`stagedspec check`: check the GPU kernels on this GPU."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from stagedspec.cli import early_checks
from stagedspec.cli.options import Device, Draft, Dtype, Json, Ngram, NoColor, Target, load_decoder
from stagedspec.cli.output import as_lines, empty_table, progress_bar, wide_console
from stagedspec.planning.tree import MODES

if TYPE_CHECKING:
    from stagedspec.check import Result

EXAMPLES = (
    "Examples: [bold]stagedspec check[/bold] checks the kernels at the shapes of the embedded models; "
    "[bold]stagedspec check --target gpt2-large --draft distilgpt2[/bold] at those of the models that you use."
)


def check(
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Mode to compare with plain decoding; may be given several times. Default: all. Only if all "
            "pass does backend auto trust the GPU."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the record. Default: in the user's cache, where backend auto looks.")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Check the GPU kernels on this GPU: each against plain torch, and every mode against plain decoding, bit by bit.

    If everything passes, backend auto uses the kernels on this GPU from then on, for models with these head sizes in
    this dtype, until the driver, torch, Triton or the kernels change. Exit status 1 if anything fails.
    """
    for one in mode or ():
        if one not in MODES:
            raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {one!r}")
    if out is not None:
        early_checks.check_folder(out, "--out")
    early_checks.check_models(target, draft, ngram, device, dtype, "auto")
    if not os.environ.get("TRITON_INTERPRET"):
        early_checks.check_gpu("check", device)

    from stagedspec import check as checks
    from stagedspec.devices import resolve_device
    from stagedspec.kernels.common import launch_configs as configs
    from stagedspec.kernels.common import registry

    where = resolve_device(device)
    if not registry.interpreted():  # TRITON_INTERPRET may be set, to 0
        early_checks.check_gpu("check", device)
    decoder = load_decoder(target, draft, ngram, where, dtype, "triton", text=False)
    with progress_bar() as progress:
        task = progress.add_task("checking", total=None)
        results = checks.check(
            decoder,
            mode or (),
            report=lambda name, done, total: progress.update(task, description=name, completed=done, total=total),
        )
    failed = sum(not result.passed for result in results)
    saved = checks.record(decoder, results, out) if failed or not mode else None
    name = configs.device_name(where)
    if as_json:
        shown = {"device": name, "passed": not failed, "saved": None if saved is None else str(saved)}
        typer.echo(as_lines(shown | {"checks": [result.as_dict() for result in results]}))
    else:
        console = wide_console(no_color)
        _print_checks(console, results)
        if failed:
            console.print(
                f"{failed} of {len(results)} checks FAILED on {name}: use --backend torch there, and please report it.",
                style="bold red",
            )
        else:
            trust = f"backend auto trusts {name} from now on ({saved})" if out is None else f"recorded in {saved}"
            trust = "nothing was recorded" if saved is None else trust
            console.print(f"All {len(results)} checks passed; {trust}.", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _print_checks(console: Console, results: "list[Result]") -> None:
    grid = empty_table()
    for name in ("check", "shape", "passed"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("remark")
    for result in results:
        passed = Text("yes") if result.passed else Text("NO", style="bold red")
        grid.add_row(Text(result.name), result.shape, passed, Text(result.remark))
    console.print(grid)
