"""Results of the kernels' benchmarks as JSON, tables and plots: written by run.py, and read again here.

    python bench/kernels/tables.py kernels-nvidia-h200.json [--update-readme]

Prints the tables of a run's JSON and draws its plots beside it. --update-readme writes both into bench/README.md.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from harness import Result, Timing, table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared with the other benchmarks
import report
from stagedspec.kernels.common.files import write_text

# The README's tables: their cases. All others come last, in one.
GROUPS = {
    "linears": ("linears", "qkv", "projection", "up", "down"),
    "attention": ("tree_attention",),
    "head": ("lm_head_choose", "lm_head_topm", "choose, walk, move"),
}
OTHERS = "others"
DRAWN = ("linears", "attention", "head")  # in the README
STYLES = ("-", "--", ":", "-.")


@dataclass
class Report:
    """Results, written one by one, so that an interrupted run leaves what it has measured.

    stem: of the files. seconds: of the whole run, and of compiling ahead. left_out: what there was no time for.
    """

    stem: Path
    machine: dict
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self) -> None:
        data = {
            "machine": self.machine,
            "seconds": self.seconds,
            "results": [result.as_dict() for result in self.results],
            "left_out": self.left_out,
        }
        write_text(self.stem.with_name(f"{self.stem.name}.json"), json.dumps(data, indent=1))
        write_text(self.stem.with_name(f"{self.stem.name}.md"), self.text())

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Raises ValueError where the file does not hold what `write` wrote."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            results = [_result(found) for found in data["results"]]
            return cls(path.with_suffix(""), data["machine"], results, data["left_out"], data["seconds"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of run.py: {type(error).__name__}: {error}") from error

    def groups(self) -> dict[str, list[Result]]:
        """The results of each table by operation and shape, whatever the order in which they were measured."""
        group_of = {op: name for name, ops in GROUPS.items() for op in ops}
        first = {op: index for index, op in enumerate(dict.fromkeys(result.op for result in self.results))}
        found: dict[str, list[Result]] = {name: [] for name in (*GROUPS, OTHERS)}
        for result in self.results:
            found[group_of.get(result.op, OTHERS)].append(result)
        for results in found.values():
            results.sort(key=lambda result: (first[result.op], result.model, *_numbers(result)))
        return {name: results for name, results in found.items() if results}

    def text(self) -> str:
        known = {name: value for name, value in self.machine.items() if name not in ("command", "gpu", "copy_gb_per_s")}
        facts = [self.machine.get("gpu"), f"a copy moves {self.machine.get('copy_gb_per_s', 0):.0f} GB/s"]
        facts += [f"{name} {value}" for name, value in known.items()]
        facts += [f"{value:.0f} s {name}" for name, value in self.seconds.items()]
        head = f"`{self.machine.get('command')}`: {', '.join(map(str, facts))}."
        tables = [f"**{name}**\n\n{table(results)}" for name, results in self.groups().items()]
        left_out = ["Left out, since the run ended before:\n\n" + "\n".join(f"- {part}" for part in self.left_out)]
        return "\n\n".join([head, *tables, *(left_out if self.left_out else [])]) + "\n"

    def plots(self) -> list[Path]:
        """Draws every table; returns the README's figures."""
        paths = {
            name: plot(results, self.stem.with_name(f"{self.stem.name}-{name}.svg"))
            for name, results in self.groups().items()
        }
        return [paths[name] for name in DRAWN if name in paths]


def _result(found: dict) -> Result:
    found = {part.name: found[part.name] for part in fields(Result)}
    peers = {name: Timing(**peer) if isinstance(peer, dict) else peer for name, peer in found["peers"].items()}
    return Result(**found | {"ours": Timing(**found["ours"]), "peers": peers})


def _numbers(result: Result) -> tuple[int, ...]:
    return tuple(value for value in result.shape.values() if isinstance(value, int))


def plot(results: list[Result], path: Path) -> Path:
    """Microseconds by number of nodes, a panel for each operation and shape: ours, and its peers."""
    import matplotlib.pyplot as plt

    import figures

    panels: dict[str, list[Result]] = {}
    for result in results:
        where = (f"{key}={value}" for key, value in result.shape.items() if key not in ("N", "path", "rows"))
        panels.setdefault(" ".join([result.op, result.model, *where]), []).append(result)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(figures.STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False, layout="constrained"
        )
        sides = ["ours", *dict.fromkeys(name for result in results for name in result.peers)]
        for axes, (title, group) in zip(grid.flat, panels.items(), strict=False):
            for i_side, side in enumerate(sides):
                points = sorted(
                    (result.shape["N"], timing.median)
                    for result in group
                    if isinstance(timing := {"ours": result.ours, **result.peers}.get(side), Timing)
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=f"C{i_side}",
                        linestyle=STYLES[i_side % len(STYLES)],
                        marker="o",
                        label=side,
                    )
            ticks = sorted({result.shape["N"] for result in group})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, ticks)
            axes.set(xlabel="nodes", ylabel="µs")
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=8)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        labels = {
            label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON that run.py wrote")
    parser.add_argument(
        "--update-readme", action="store_true", help="write the tables and figures into bench/README.md"
    )
    options = parser.parse_args(arguments)
    try:
        found = Report.read(options.file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    drawn = found.plots()
    print(found.text())
    if options.update_readme:
        pictures = [f"![µs by nodes: {path.stem}](figures/{path.name})" for path in drawn]
        report.update_readme("kernels", "\n\n".join([found.text(), *pictures]), drawn, report.README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
