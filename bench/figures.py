"""The benchmarks' figures, in colours of the Okabe-Ito palette, each with a marker of its own."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f96",
    "axes.labelcolor": "#24292f",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "axes.grid": True,
    "grid.color": "#e7e9ec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "svg.hashsalt": "stagedspec",  # the same numbers give the same file
}
LOOKS = {
    "chain": ("#56b4e9", "^"),
    "tree": ("#009e73", "s"),
    "staged": ("#d55e00", "o"),
    "transformers": ("#8a8f96", "x"),
    "transformers assisted": ("#cc79a7", "D"),
    "transformers lookup": ("#0072b2", "v"),
    "transformers static": ("#e69f00", "P"),
}
RULES = {
    "coupled": ("#d55e00", "o"),
    "recursive": ("#0072b2", "s"),
    "multi-round": ("#009e73", "^"),
    "top-m": ("#8a8f96", "D"),
}
INK, FAINT = "#24292f", "#8a8f96"


def save(figure, path: Path) -> list[Path]:
    """Writes a figure as SVG and PNG. Returns both paths."""
    paths = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)
    return paths


def roofline(report: dict, path: Path) -> list[Path]:
    """Figure 1: the machine's roofs and the models' passes below them.

    report: "arithmetic" FLOP/s; "roofs": [{"name", "bytes_per_second"}]; "passes": [{"model", "nodes", "seconds",
    "flops", "bytes"}].
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        peak, passes = report["arithmetic"], report["passes"]
        intensities = [entry["flops"] / entry["bytes"] for entry in passes]
        slowest = min(roof["bytes_per_second"] for roof in report["roofs"])
        left, right = min(intensities) / 1.8, max(*intensities, peak / slowest) * 2.5
        for index, roof in enumerate(report["roofs"]):
            speed = roof["bytes_per_second"]
            corner = min(peak / speed, right)
            axes.plot([left, corner], [left * speed, corner * speed], color=INK, linestyle=("-", "--", ":")[index % 3])
            label = f"{roof['name']}: {_rate(speed)} GB/s"
            axes.plot([], [], color=INK, linestyle=("-", "--", ":")[index % 3], label=label)
        axes.axhline(peak, color=INK, linewidth=1.2)
        axes.text(right / 1.05, peak * 1.06, f"arithmetic: {_rate(peak)} GFLOP/s", ha="right", va="bottom")
        models = list(dict.fromkeys(entry["model"] for entry in passes))
        rates = [entry["flops"] / entry["seconds"] for entry in passes]
        highest = passes[rates.index(max(rates))]["model"]
        for model, look in zip(models, (LOOKS["staged"], ("#0072b2", "s")), strict=False):
            points = [entry for entry in passes if entry["model"] == model]
            x = [entry["flops"] / entry["bytes"] for entry in points]
            y = [entry["flops"] / entry["seconds"] for entry in points]
            axes.plot(x, y, color=look[0], marker=look[1], linewidth=1.2, label=f"{model}'s pass over M tokens")
            for entry, a, b in zip(points, x, y, strict=True):
                axes.annotate(
                    f"M={entry['nodes']}",
                    (a, b),
                    textcoords="offset points",
                    xytext=(0, 8 if model == highest else -16),
                    ha="center",
                    color=look[0],
                    fontsize=9,
                )
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(rates) / 2, peak * 2))
        axes.set(xlabel="arithmetic per byte of weights, FLOP/byte", ylabel="GFLOP/s", title="Roofline of this machine")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:,.10g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.legend(loc="outside lower center", ncols=2)
        return save(figure, path)


def _rate(value: float) -> str:
    """In units of 1e9, three digits."""
    return f"{float(f'{value / 1e9:.3g}'):,.10g}"


def speedups(
    panels: dict[str, dict[str, Sequence[float]]], paper: dict[str, dict[str, float]], path: Path
) -> list[Path]:
    """Figure 2: the speed-up of every prompt over autoregressive decoding, sorted, with a panel for each sampling.

    panels: title to {side: speed-ups}. paper: title to {side: the paper's mean speed-up}.
    """
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(5 * len(panels), 4.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (title, sides) in zip(grid[0], panels.items(), strict=True):
            axes.axhline(1, color=INK, linewidth=1)
            for name, values in sides.items():
                colour, marker = LOOKS.get(name, (FAINT, "."))
                axes.plot(
                    range(1, len(values) + 1), sorted(values, reverse=True), color=colour, marker=marker, label=name,
                    markersize=4, linewidth=2.2 if name == "staged" else 1.3, zorder=3 if name == "staged" else 2,
                )  # fmt: skip
            for name, value in paper.get(title, {}).items():
                axes.axhline(value, color=LOOKS[name][0], linestyle=(0, (1, 2)), linewidth=1.4)
                axes.annotate(  # on the left and below: there the sorted lines are highest
                    f"paper, {name} {value:.2f}x", (0, value), xycoords=("axes fraction", "data"), ha="left",
                    va="top", fontsize=8.5, color=LOOKS[name][0], textcoords="offset points", xytext=(3, -2),
                )  # fmt: skip
            axes.set(title=title, xlabel="prompts, sorted by speed-up", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5), numticks=20))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        grid[0][0].set_ylabel("speed-up over autoregressive")
        handles = {
            label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(6, max(1, len(handles))))
        return save(figure, path)


def ablation(lines: Sequence[dict], path: Path) -> list[Path]:
    """Tokens a second over the nodes of a tree, with a line for each number of draft passes.

    lines: {"tokens_per_second", and "tree": {"nodes", "passes"} but for plain decoding}.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        trees = [line for line in lines if "tree" in line]
        counts = sorted({line["tree"]["passes"] for line in trees})
        colours = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#0072b2")
        for index, passes in enumerate(counts):
            some = [line for line in trees if line["tree"]["passes"] == passes]
            some.sort(key=lambda line: line["tree"]["nodes"])
            axes.plot(
                [line["tree"]["nodes"] for line in some], [line["tokens_per_second"] for line in some],
                color=colours[index % len(colours)], marker="osD^vP"[index % 6], label=f"{passes} draft passes",
            )  # fmt: skip
        for line in lines:
            if "tree" not in line:
                axes.axhline(line["tokens_per_second"], color=INK, linewidth=1, linestyle="--", label="plain decoding")
        axes.set(xlabel="nodes of a tree", ylabel="tokens/s", ylim=(0, None), title="Tokens a second, greedy")
        axes.set_xticks(sorted({line["tree"]["nodes"] for line in trees}))
        figure.legend(loc="outside right upper")
        return save(figure, path)


def acceptance(report: dict, path: Path) -> list[Path]:
    """Acceptance by number of children, with a column for each temperature; below, the gain of the coupled rule.

    report: "children": [m]; "temperatures": [{"temperature", "rules": {name: [{"mean", "low", "high"}]}, "difference":
    [{"mean", "low", "high"}]}].
    """
    children, columns = report["children"], report["temperatures"]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(columns), figsize=(2.9 * len(columns) + 0.6, 5.6), sharex=True, sharey="row", squeeze=False,
            height_ratios=(2, 1), layout="constrained",
        )  # fmt: skip
        shift = 2 ** (1 / 16)  # error bars beside each other
        for column, entry in enumerate(columns):
            above, below = grid[:, column]
            for index, (name, points) in enumerate(entry["rules"].items()):
                colour, marker = RULES[name]
                x = [m * shift ** (index - 1.5) for m in children]
                above.errorbar(
                    x,
                    [100 * p["mean"] for p in points],
                    _bars(points),
                    color=colour,
                    marker=marker,
                    capsize=2,
                    label=RULE_NAMES[name],
                    linewidth=2 if name == "coupled" else 1.4,
                )
            points = entry["difference"]
            below.axhline(0, color=INK, linewidth=1)
            below.errorbar(
                children,
                [100 * p["mean"] for p in points],
                _bars(points),
                color=RULES["coupled"][0],
                marker="o",
                capsize=2,
            )
            above.set_title(f"T = {entry['temperature']:g}")
            below.set_xscale("log", base=2)
            below.set_xticks(children, [str(m) for m in children])
            below.xaxis.set_minor_formatter(NullFormatter())
        grid[0][0].set_ylabel("accepted, %")
        grid[1][0].set_ylabel("coupled less\nrecursive, points")
        most = max(
            1.0, *(abs(100 * p[bound]) for entry in columns for p in entry["difference"] for bound in ("low", "high"))
        )
        grid[1][0].set_ylim(-math.ceil(most), math.ceil(most))
        figure.supxlabel("children of a node", fontsize=10)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return save(figure, path)


RULE_NAMES = {
    "coupled": "ours: shared noise",
    "recursive": "recursive rejection",
    "multi-round": "SpecInfer multi-round",
    "top-m": "top m, no noise",
}


def _bars(points: Sequence[dict]) -> list[list[float]]:
    """Lengths of the error bars below and above the means, in points of percent."""
    return [
        [max(0.0, 100 * (p["mean"] - p["low"])) for p in points],
        [max(0.0, 100 * (p["high"] - p["mean"])) for p in points],
    ]
