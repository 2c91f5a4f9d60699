"""The tables and figures of the paper (Spector & Ré, arXiv 2308.04623), measured on your models and this machine.

    python bench/paper.py [--target T --draft D --ngram N] [--prompts FILE.jsonl[.gz]] [--limit 24] [--out FOLDER]

Table 1: weight bytes read per token. Table 2: tokens per second. Table 3: whole calls and steps apart, passes, bytes a
second, time to first token. Figure 1: the machine's roofline. Figure 2: the speed-up of every prompt. Figure 3:
completions coloured by the model that first proposed each token. Every run is noted as soon as it is done: after an
interruption the same command continues. See bench/README.md.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low

from rich.console import Console
from rich.style import Style

import figures
from journal import Journal, code_fingerprint
from machine import arguments_of, arithmetic, header, read_bandwidth, where
from report import FIGURES, markdown, number, update_readme
from sides import (
    ASSISTED,
    BASELINE,
    HERE,
    LOOKUP,
    PLAIN,
    STATIC,
    Models,
    add_options,
    check_options,
    clear_errors,
    encode,
    load,
    measure,
    our_side,
    transformers_side,
)
from stagedspec import MODES
from stagedspec.cli.origins import Shown, pieces, save
from stagedspec.cli.output import ORIGIN_STYLES, PROMPT_STYLE, paint, print_legend
from stagedspec.decoding.warm_up import CHOICES
from stagedspec.kernels.common.files import write_text
from stagedspec.planning.cost import PassTimes
from stagedspec.tuning.compare import Row, Timed, speedups, summarise
from stagedspec.tuning.prompts import read_prompts

TITLES = {"greedy": "greedy", "sample": "top-k 50, T=1"}
# Tables 1 and 2 of the paper: GPT-2-L on an RTX 4090, HumanEval. (tokens/s, weight bytes per token.)
PAPER = {
    "greedy": {"autoregressive": (150, 1.00), "chain": (350, 0.31), "staged": (475, 0.23)},
    "sample": {"autoregressive": (150, 1.00), "chain": (219, 0.48), "staged": (298, 0.35)},
}
NODES = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Compared:
    """Sides that took turns on the same prompts, with one of `samplings`. title: what tables call it."""

    sampling: str
    title: str
    runs: list[Timed]
    sides: list[str]

    @property
    def prompts(self) -> int:
        """How many were measured."""
        return len({run.prompt for run in self.runs})

    @property
    def foreign(self) -> frozenset[str]:
        """Sampled, transformers draws other random numbers: its tokens are not expected to be ours."""
        return frozenset(side for side in self.sides if side not in MODES and self.sampling == "sample")

    @property
    def rows(self) -> list[Row]:
        return summarise(self.runs, self.sides, self.foreign)

    @property
    def ratios(self) -> dict[str, list[float | None]]:
        """The speed-up of each side on every prompt, None where its output differs."""
        return {
            side: speedups(self.runs, side, BASELINE) for side in self.sides if side not in self.foreign | {BASELINE}
        }

    def as_dict(self, target_bytes: int, roof: float) -> dict:
        return {
            "prompts": self.prompts,
            "sides": [row.as_dict() for row in self.rows],
            "speedups": self.ratios,
            "table_3": [speeds(self.runs, side, target_bytes, roof) for side in self.sides],
        }


# ---------------------------------------------------------------- what is measured


def samplings(options: argparse.Namespace) -> dict[str, dict]:
    common = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    return {
        "greedy": {"do_sample": False, **common},
        "sample": {"do_sample": True, "temperature": 1.0, "top_k": options.top_k, **common},
    }


def our_sides(models: Models, settings: dict, prompts: list) -> dict:
    """Our modes, the baseline first; without a draft that alone. All are ready: nothing is compiled when they run."""
    modes = MODES if models.draft is not None else (BASELINE,)
    decoder = models.decoder
    if decoder.target.ops.compiles_kernels:  # else the first prompt of each length captures graphs while it is timed
        chosen = {key: value for key, value in settings.items() if key in CHOICES}
        longest = max(ids.shape[1] for ids in prompts)
        decoder.warm_up(modes, [chosen], tokens=longest + settings["max_new_tokens"])
    return {mode: our_side(decoder, mode, settings) for mode in modes}


def peers(models: Models, settings: dict, prompts: list, console: Console) -> dict:
    """transformers alone, with the draft as assistant if there is one, with prompt lookup, and on a GPU compiled with a
    static cache, if it compiles."""
    kinds = (PLAIN, ASSISTED, LOOKUP) if models.draft is not None else (PLAIN, LOOKUP)
    sides = {kind: transformers_side(models, settings, kind) for kind in kinds}
    if models.decoder.device.type == "cuda":
        static = transformers_side(models, settings, STATIC)
        try:
            static(max(prompts, key=lambda ids: ids.shape[1]))
            sides[STATIC] = static
        except Exception as error:  # of a compiler, of any kind: nothing else is to be lost by it
            console.print(f"left out: {STATIC} ({type(error).__name__}: {error})"[:400], highlight=False)
    return sides


def measure_roofline(models: Models) -> dict:
    """The machine's roofs, and passes of each model over 1 to 64 tokens, with FLOPs and bytes of the weights alone."""
    decoder = models.decoder
    roofs = [{"name": "memory", "bytes_per_second": read_bandwidth(1 << 30, decoder.device)}]
    if decoder.device.type == "cpu":
        # Small models stay in the last cache from pass to pass.
        size = decoder.target.weight_bytes + (0 if decoder.draft is None else decoder.draft.weight_bytes)
        name = f"the models' {size / 1e6:.0f} MB, over and over"
        roofs.append({"name": name, "bytes_per_second": read_bandwidth(size, decoder.device)})
    times = PassTimes(decoder.target, decoder.draft)
    passes = []
    for name, model in (("target", decoder.target), ("draft", decoder.draft)):
        for nodes in NODES if model is not None else ():
            seconds = (times.target_pass if name == "target" else times.draft_pass)(1, nodes, False)
            flops = 2 * nodes * model.weight_bytes // model.dtype.itemsize
            passes.append(
                {"model": name, "nodes": nodes, "seconds": seconds, "flops": flops, "bytes": model.weight_bytes}
            )
    return {"arithmetic": arithmetic(decoder.target.dtype, decoder.device), "roofs": roofs, "passes": passes}


def completions(
    models: Models, prompts: list, steps: dict[str, list[float]], options: argparse.Namespace
) -> list[Shown]:
    """Figure 3: for each sampling the staged completion of the prompt whose tokens per step are the median."""
    mode = "staged" if models.draft is not None else BASELINE
    result = []
    for name, settings in samplings(options).items():
        index = steps[name].index(median_low(steps[name]))
        more = {key: value for key, value in settings.items() if key != "max_new_tokens"}
        done = models.decoder.complete(prompts[index], options.max_new_tokens, mode=mode, eos_token_id=[], **more)
        parts = pieces(models.tokenizer, done.tokens, done.origins)
        result.append(Shown(f"{mode}, {TITLES[name]}", models.tokenizer.decode(prompts[index][0]), parts))
    return result


def compare_all(
    models: Models, prompts: list, journal: Journal, options: argparse.Namespace, until: float, console: Console
) -> list[Compared]:
    """Our modes and transformers, taking turns on every prompt, greedy and sampled. With --peer-prompts first our modes
    on all prompts, then all sides on the first few: transformers takes many times as long.

    until: a time of `time.perf_counter` by which to end; every comparison has a share of what is left, and measures one
    prompt at least.
    """
    few = options.peer_prompts is not None and options.peer_prompts < len(prompts)
    plans = [(name, False, prompts) for name in TITLES] if few else []
    plans += [(name, True, prompts[: options.peer_prompts]) for name in TITLES]
    found = []
    for index, (name, beside_peers, some) in enumerate(plans):
        settings = samplings(options)[name]
        shares = [1 if with_peers else 3 for _, with_peers, _ in plans[index:]]
        end = time.perf_counter() + (until - time.perf_counter()) * shares[0] / sum(shares)
        sides = our_sides(models, settings, some) | (peers(models, settings, some, console) if beside_peers else {})
        title = f"{name}, peers" if few and beside_peers else name
        runs = measure(sides, some, options.repeats, title, journal, end)
        measured = len({run.prompt for run in runs})
        if measured < len(some):
            console.print(f"left out, time is over: {title}: {len(some) - measured} of {len(some)} prompts",
                          highlight=False)  # fmt: skip
        shown = f"{TITLES[name]}, {'first ' * beside_peers}{measured} prompts" if few else TITLES[name]
        found.append(Compared(name, shown, runs, list(sides)))
    return found


# ---------------------------------------------------------------- tables


def table_1(compared: list[Compared]) -> str:
    """Weight bytes read per token, relative to autoregressive decoding, ours beside the paper's. Each side's are of the
    first comparison that it is in."""
    headings = ["weight bytes per token"]
    found: dict[str, dict[str, Row]] = {name: {} for name in TITLES}
    for one in compared:
        found[one.sampling] = {row.name: row for row in one.rows} | found[one.sampling]
    lines = []
    for name in TITLES:
        headings += [TITLES[name], "paper"]
    for side in dict.fromkeys(side for one in compared for side in one.sides):
        line = [side]
        for name in TITLES:
            row, paper = found[name].get(side), PAPER[name].get(side)
            line += [number(row and row.weight_bytes_per_token), number(paper and paper[1])]
        lines.append(line)
    return markdown(headings, lines)


def table_2(compared: Compared) -> str:
    """Tokens per second, speed-up over autoregressive and tokens per step, ours beside the paper's."""
    paper = PAPER[compared.sampling]
    headings = [compared.title, "tokens/s", "speed-up", "tokens/step", "same output", "paper: tokens/s", "speed-up"]
    lines = []
    for row in compared.rows:
        same = {None: "not comparable", True: "yes"}.get(row.identical, f"NO ({row.differing} differ)")
        theirs = paper.get(row.name)
        ours = number(row.tokens_per_second, ".0f"), number(row.speedup, ".2f", "x"), number(row.tokens_per_step), same
        ratio = theirs and theirs[0] / paper[BASELINE][0]
        lines.append([row.name, *ours, number(theirs and theirs[0], "d"), number(ratio, ".2f", "x")])
    return markdown(headings, lines)


def speeds(runs: list[Timed], name: str, target_bytes: int, roof: float) -> dict:
    """Medians over the runs of one side for Table 3.

    steps_per_second: new tokens a second without what comes before the steps: prefill, or for transformers all up to
    the first token. bytes_per_second: weights read in that time; share: of `roof`. ratio: the baseline's time of a
    whole call over this side's, whether or not the tokens are the same; each wrote as many.
    """
    base = {(run.prompt, run.repeat): run.seconds for run in runs if run.side == BASELINE}
    found: dict[str, list[float]] = {}
    for run in (run for run in runs if run.side == name):
        stats, tokens = run.run.stats, len(run.run.tokens)
        first = stats.get("seconds_to_first_token")
        if "seconds" in stats:
            steps = tokens / (stats["total_seconds"] - stats["seconds"].get("prefill", 0.0))
        else:
            steps = math.nan if first is None or tokens < 2 else (tokens - 1) / (run.seconds - first)
        values = {
            "tokens_per_second": tokens / run.seconds,
            "ratio": base[run.prompt, run.repeat] / run.seconds,
            "steps_per_second": steps,
            "target_passes": stats["target_passes"],
            "draft_passes": stats["draft_passes"],
            "bytes_per_second": steps * stats["weight_bytes_per_token"] * target_bytes,
            "seconds_to_first_token": math.nan if first is None else first,
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    medians = {key: median(values) for key, values in found.items()}
    return medians | {"name": name, "runs": len(found["ratio"]), "share": medians["bytes_per_second"] / roof}


def table_3(title: str, lines: list[dict]) -> str:
    """Whole calls and steps apart."""
    headings = [title, "calls", "tokens/s", "over plain", "steps alone", "passes: target", "draft", "GB/s",
                "of the roof", "first token, ms"]  # fmt: skip
    forms = {"runs": "d", "tokens_per_second": ".0f", "ratio": ".2f", "steps_per_second": ".0f",
             "target_passes": ".0f", "draft_passes": ".0f"}  # fmt: skip
    rows = []
    for line in lines:
        cells = [format(line[key], form) for key, form in forms.items()]
        cells += [f"{line['bytes_per_second'] / 1e9:.4g}", f"{line['share']:.0%}"]
        rows.append([line["name"], *cells, f"{1e3 * line['seconds_to_first_token']:.2f}"])
    return markdown(headings, rows)


def tables(compared: list[Compared], report: dict) -> dict[str, list[str]]:
    """The three tables as Markdown, the second and third in a part for each comparison."""
    return {
        "Table 1": [table_1(compared)],
        "Table 2": [table_2(one) for one in compared],
        "Table 3": [
            table_3(one.title, found["table_3"]) for one, found in zip(compared, report["compared"], strict=True)
        ],
    }


def summary(report: dict, compared: list[Compared]) -> str:
    """The part of bench/README.md that this script writes."""
    prompts = report["prompts"]
    skipped = f", {prompts['skipped']} skipped as empty or longer than {prompts['room']} tokens" * bool(
        prompts["skipped"]
    )
    settings = report["settings"]
    spoken = f" ({prompts['measured']} of them measured)" * (prompts["measured"] != prompts["used"])
    shown = {name: f"**{name}**\n\n" + "\n\n".join(found) for name, found in tables(compared, report).items()}
    beside = (
        " Where transformers is in a table, all of its sides ran on the same prompts, taking turns; in Table 1 its "
        "figures are of those prompts. Compare tokens/s within a table, not between tables."
    )
    parts = [
        f"`{report['command']}`  \n{where(report)}  \n"
        f"{prompts['used']} prompts of `{prompts['file']}`{skipped}{spoken}; {settings['max_new_tokens']} new tokens, "
        f"batch 1, {settings['dtype']}.",
        shown["Table 1"],
        shown["Table 2"],
        "Sampled, transformers draws other random numbers: its tokens are not comparable token by token, so it gets no "
        "ratio." + beside * (len(compared) > len(TITLES)),
        shown["Table 3"],
        "Medians over the calls. Over plain: time of a whole call of `autoregressive` over that of the side, whether "
        "or not the tokens are the same: other kernels round otherwise. Steps alone: without prefill; transformers: "
        "after the first token. GB/s: weights read in that time, beside the rate at which this machine reads or copies "
        "memory.",
        "**Figure 1**\n\n![The machine's roofs and the models' passes](figures/figure1.svg)",
        "**Figure 2**\n\n![Speed-up of every prompt, sorted](figures/figure2.svg)",
        "**Figure 3** ([the same as HTML](figures/figure3.html))\n\n"
        "![Completions, tokens by the model that first proposed them](figures/figure3.svg)",
    ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=24, max_new_tokens=128)
    parser.add_argument("--repeats", type=int, default=1, help="runs of every side on every prompt")
    parser.add_argument(
        "--peer-prompts",
        type=int,
        help="transformers runs on so many of the prompts, after our modes ran on all (default: all)",
    )
    parser.add_argument("--tree", type=Path, help="trees that `stagedspec tune-tree` wrote")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further prompt after so long")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paper", help="folder to write to")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured before")
    parser.add_argument("--update-readme", action="store_true", help="also write bench/README.md and bench/figures/")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def bench(options: argparse.Namespace, arguments: list[str], console: Console) -> bool:
    """Measures, writes and prints everything. Returns whether our modes agree. Raises ValueError for bad input."""
    began = time.perf_counter()
    prompts = read_prompts(options.prompts)
    models = load(options)
    room = models.positions - options.max_new_tokens
    encoded, skipped = encode(prompts, models.tokenizer, room, options.limit)
    console.print(f"{len(encoded)} prompts, {skipped} skipped: empty, or longer than {room} tokens", highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    report = header("paper.py", arguments, models.decoder.device) | {
        "prompts": {"file": options.prompts.name, "used": len(encoded), "skipped": skipped, "room": room},
        "settings": {key: getattr(options, key) for key in ("max_new_tokens", "dtype", "seed", "top_k")}
        | {"backend": models.decoder.backend},
    }
    key = {name: report[name] for name in ("versions", "machine", "settings")}
    key |= {"models": models.fingerprint(), "code": code_fingerprint()}
    key |= {} if options.tree is None else {"tree": options.tree.read_text(encoding="utf-8")}
    journal = Journal(options.out / "runs.jsonl", key, options.fresh)
    if journal.entries:
        console.print(f"{len(journal.entries)} runs were measured before; --fresh measures them again", highlight=False)

    report["roofline"] = measure_roofline(models)
    compared = compare_all(models, encoded, journal, options, began + options.seconds, console)
    report["prompts"]["measured"] = min(one.prompts for one in compared[: len(TITLES)])
    target_bytes, roof = models.decoder.target.weight_bytes, report["roofline"]["roofs"][0]["bytes_per_second"]
    report["compared"] = [
        {"sampling": one.sampling, "title": one.title, **one.as_dict(target_bytes, roof)} for one in compared
    ]
    report["identical"] = all(row.identical for one in compared for row in one.rows if row.name in MODES)
    panels: dict[str, dict] = {title: {} for title in TITLES.values()}
    steps = {}
    for one in reversed(compared):  # a side's figures are those of the first comparison that it is in
        panels[TITLES[one.sampling]] |= one.ratios
        last = [side for side in one.sides if side in MODES][-1]
        steps[one.sampling] = [
            run.run.stats["tokens_per_step"] for run in one.runs if run.side == last and run.repeat == 0
        ]

    written = figures.roofline(report["roofline"], options.out / "figure1")
    paper = {
        TITLES[name]: {
            side: values[0] / PAPER[name][BASELINE][0] for side, values in PAPER[name].items() if side != BASELINE
        }
        for name in PAPER
    }
    drawn = {title: {side: found for side, found in ratios.items() if None not in found}
             for title, ratios in panels.items()}  # fmt: skip
    written += figures.speedups(drawn, paper, options.out / "figure2")
    shown = completions(models, encoded, steps, options)
    for path in (options.out / "figure3.svg", options.out / "figure3.html"):
        save(path, shown)
        written.append(path)
    text = summary(report, compared)
    write_text(options.out / "paper.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "paper.md", text.replace("figures/", "") + "\n")

    print_completions(console, shown)
    for part in (part for parts in tables(compared, report).values() for part in parts):
        console.print(f"\n{part}", highlight=False, soft_wrap=True)
    console.print(f"\n{report['command']}\n{where(report)}\nwritten to {options.out}", highlight=False, soft_wrap=True)
    if options.update_readme:
        update_readme("paper", text, [path for path in written if path.suffix != ".png"])
        console.print(f"bench/README.md and bench/{FIGURES.name}/ updated", highlight=False)
    return report["identical"]


def print_completions(console: Console, shown: list[Shown]) -> None:
    """Figure 3 in the terminal."""
    for completion in shown:
        console.print()
        console.rule(completion.title, align="left")
        print_legend(console)
        paint(console, completion.prompt, PROMPT_STYLE)
        for text, origin in completion.parts:
            paint(console, text, ORIGIN_STYLES[origin])
        paint(console, "\n", Style())


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = arguments_of(arguments)
    same = bench(parse(arguments), arguments, Console())
    if not same:
        print(
            "OUTPUTS of our modes DIFFER from autoregressive decoding: this is a bug, please report it", file=sys.stderr
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
