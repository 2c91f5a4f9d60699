"""`stagedspec tune`: tune the launch settings of the GPU kernels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagedspec.cli import early_checks
from stagedspec.cli.options import Json, NoColor
from stagedspec.cli.output import as_lines, empty_table, progress_bar, wide_console
from stagedspec.models import checkpoints

if TYPE_CHECKING:
    from stagedspec.tuning.kernels import Tuned

EXAMPLES = (
    "Examples: [bold]stagedspec tune[/bold] tunes for the embedded models and keeps what it finds for later "
    "runs on this GPU; [bold]stagedspec tune --model L --op lm_head[/bold] tunes one operation at the shapes of GPT-2 "
    "L; [bold]stagedspec tune --model path/to/model --out settings.json[/bold] writes a file of its own."
)


def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Shapes to tune for: S, M, L, XL (GPT-2's sizes), embedded, or a model, a hub id or a folder; may be "
            "given several times. Default: embedded."
        ),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="Operation; may be given several times. Default: all that can be tuned.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, JSON. Default: in the user's cache, where kernels look first.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ...")] = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Tune the launch settings of the GPU kernels for this GPU. Only the speed changes.

    Settings whose results differ in any bit from the default's are refused. To choose token trees, use
    `stagedspec tune-tree`.
    """
    if out is not None:
        early_checks.check_output(out, "--out")
    early_checks.check_device(device)
    for name in op or ():
        if name not in early_checks.OPERATIONS:
            raise ValueError(f"--op must be one of {', '.join(early_checks.OPERATIONS)}, got {name!r}")
    for name in model or ():
        if name not in ("embedded", "S", "M", "L", "XL"):
            try:
                checkpoints.find(name, "--model")
            except ValueError as error:
                raise ValueError(f"{error}, or S, M, L, XL or embedded") from None

    early_checks.check_gpu("tune", device)

    import torch

    from stagedspec.devices import resolve_device
    from stagedspec.kernels.common import launch_configs as configs
    from stagedspec.tuning import kernels as tune_kernels

    where = resolve_device(device)
    ops = op or list(tune_kernels.PROBLEMS)
    shapes = tune_kernels.shapes(model or ["embedded"])
    name = configs.device_name(where)
    saved = (configs.user_file(name) if out is None else out).expanduser()
    if saved.is_file():  # other shapes in it are kept: find out now, not after the tuning, if it is damaged
        configs.read(saved, name)
    torch.cuda.set_device(where)  # kernels are launched, and graphs captured, on the current device
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("tuning", total=None)

        def report(name: str, done: int, total: int) -> None:
            progress.update(task, description=f"tuning {name}", completed=done, total=total, refresh=True)

        def keep(one: tune_kernels.Tuned) -> None:
            configs.write(saved, name, tune_kernels.table([one]))

        found = tune_kernels.tune_all(ops, shapes, where, report, keep=keep)
    if not found:
        raise ValueError(
            f"nothing to tune: on {name} there are no settings to choose from for {', '.join(ops)} at these shapes; "
            "name other operations (--op) or models (--model)"
        )
    if as_json:
        result = {"saved": str(saved), "device": name, "tuned": [one.as_dict() for one in found]}
        typer.echo(as_lines(result))
        return
    _print_tuned(wide_console(no_color), found)
    typer.echo(f"Saved in {saved}")


def _print_tuned(console: Console, found: "list[Tuned]") -> None:
    grid = empty_table()
    for name in ("operation", "shape", "settings"):
        grid.add_column(name)
    for name in ("µs, default", "µs, tuned", "speed-up", "refused", "failed"):
        grid.add_column(name, justify="right", no_wrap=True)
    for one in found:
        settings = " ".join(f"{name}={value}" for name, value in one.settings.items())
        times = (" ".join(f"{time:.1f}" for time in side) for side in one.times)
        gain = "default" if one.settings == one.default else f"{one.speedup:.2f}x"
        shape = "x".join(map(str, one.shape))
        grid.add_row(one.op, shape, settings, *times, gain, str(len(one.refused)), str(len(one.failed)))
    console.print(grid)
