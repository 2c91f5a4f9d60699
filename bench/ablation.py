"""What each part of staged decoding brings: nodes, passes, width, prefetch, n-grams, drafts, one at a time.

    python bench/ablation.py --target T --draft D --ngram N [--tree tree.json] [--drafts D2 ...] [--out FOLDER]

Every variant is a fixed tree. Up to six of a group take turns with plain decoding on every prompt, greedy, and are
compared with it token by token. The base is the tree that the decoder would use. Groups, the first ones first when time
is short:

    staged    the tree with draft² (staged) over the same tree without (tree), at equal nodes
    n-gram    both n-grams, the Katz table alone, the context's alone, none
    nodes     tokens a second over nodes and draft passes: the figure
    shape     width and prefetch
    drafts    other drafts for the same target

What ran is kept: the same command goes on. See bench/README.md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

import figures
import stagedspec
from journal import Journal, code_fingerprint, prompt_hash
from machine import arguments_of, header, where
from report import markdown, update_readme
from sides import BASELINE, HERE, Models, add_options, check_options, clear_errors, encode, load, measure
from stagedspec import TreeConfig
from stagedspec.kernels.common.files import write_text
from stagedspec.tuning.compare import Run, Timed, summarise
from stagedspec.tuning.prompts import read_prompts

TOGETHER = 6  # even, so that tree and staged take turns
NODES, PASSES, WIDTHS, PREFETCH = (8, 16, 24, 32, 48, 64), (1, 2, 3, 4, 6), (1, 2, 4), (0, 1, 2, 4, 8)
STAGED_NODES, STAGED_PASSES = (16, 32, 64), (2, 4)


@dataclass(frozen=True)
class Variant:
    """A tree, and the decoder that grows it."""

    decoder: stagedspec.Decoder
    tree: TreeConfig


# ---------------------------------------------------------------- what is measured


def shaped(base: TreeConfig, deepest: int, **changes: int) -> TreeConfig:
    """The base tree with changes, without floors, as deep as its passes reach and as `deepest`. Raises ValueError if it
    cannot be."""
    tree = replace(base, node_floor=0.0, pass_floor=0.0, nodes=2, children=8)
    for name, value in changes.items():
        if name != "nodes":
            tree = replace(tree, **{name: value})
    depth = min(deepest, tree.passes * (1 + tree.prefetch))
    return replace(tree, depth=depth, nodes=changes.get("nodes", base.nodes))


def groups(models: Models, base: TreeConfig, drafts: dict[str, stagedspec.Decoder]) -> dict[str, dict[str, Variant]]:
    """The variants of each group by name; trees that cannot be, or that the backend cannot grow, are left out."""
    decoder = models.decoder
    prefetch = base.prefetch or 1
    found: dict[str, dict[str, Variant]] = {name: {} for name in ("staged", "n-gram", "nodes", "shape", "drafts")}

    def add(group: str, name: str, using: stagedspec.Decoder = decoder, **changes: int) -> None:
        try:
            tree = shaped(base, using.target.ops.max_depth, **changes)
            using.target.ops.check_tree(tree, using.ngram)
        except ValueError:
            return
        found[group][name] = Variant(using, tree)

    wide = max(base.width, 4)  # enough for many nodes in few passes, without prefetch, too
    for nodes in STAGED_NODES:
        for passes in STAGED_PASSES:
            for name, levels in (("tree", 0), ("staged", prefetch)):
                changes = {"nodes": nodes, "passes": passes, "width": wide, "prefetch": levels}
                add("staged", f"{name}, {nodes} nodes, {passes} passes", **changes)
    # A decoder of the same weights without the table.
    bare = stagedspec.Decoder(decoder.target, decoder.draft, None, decoder.tokenizer)
    if decoder.ngram is not None:
        add("n-gram", "Katz table and context", prefetch=prefetch)
        add("n-gram", "Katz table alone", prefetch=prefetch, context=False)
    add("n-gram", "context alone", bare, prefetch=prefetch)
    add("n-gram", "none", prefetch=0)
    for passes in PASSES:
        for nodes in NODES:
            add("nodes", f"{nodes} nodes, {passes} passes", nodes=nodes, passes=passes, width=wide, prefetch=prefetch)
    for width in WIDTHS:
        add("shape", f"width {width}", width=width)
    for levels in PREFETCH:
        add("shape", f"prefetch {levels}", prefetch=levels)
    for name, other in drafts.items():
        add("drafts", name, other)
    return {name: variants for name, variants in found.items() if variants}


def parts(all_groups: dict[str, dict[str, Variant]]) -> Iterator[tuple[str, int, dict[str, Variant]]]:
    """The groups in parts of few variants: a decoder keeps the CUDA graphs of its last eight generations."""
    for group, variants in all_groups.items():
        names = list(variants)
        for part, start in enumerate(range(0, len(names), TOGETHER)):
            yield group, part, {name: variants[name] for name in names[start : start + TOGETHER]}


def side(decoder: stagedspec.Decoder, tree: TreeConfig | None, new_tokens: int) -> Callable[[torch.Tensor], Run]:
    """Greedy decoding with one tree, as a side of `compare`; None: plain decoding."""
    options = {"mode": BASELINE} if tree is None else {"mode": "staged", "tree": tree}

    def run(ids: torch.Tensor) -> Run:
        output = decoder.generate(ids, max_new_tokens=new_tokens, eos_token_id=[], do_sample=False, **options)
        stats = decoder.last_stats.as_dict()
        return Run(output[0, ids.shape[1] :].tolist(), stats | {"steps": stats["row_steps"]})

    return run


def measured(
    variants: dict[str, Variant], plain: stagedspec.Decoder, prompts: list, title: str, new: int
) -> list[dict]:
    """A line for plain decoding and for each variant: medians over prompts, and whether the tokens are those of plain
    decoding."""
    sides = {BASELINE: side(plain, None, new)}
    sides |= {name: side(variant.decoder, variant.tree, new) for name, variant in variants.items()}
    runs = measure(sides, prompts, 1, title)
    lines = []
    for row in summarise(runs, list(sides)):
        one = [run for run in runs if run.side == row.name]
        line = {"name": row.name, "over_plain": row.speedup, "identical": row.identical}
        line |= {"tokens_per_second": median(len(run.run.tokens) / run.seconds for run in one)}
        line |= {"tokens_per_step": row.tokens_per_step, "step_seconds": median(map(step_seconds, one))}
        line["draft_passes"] = sum(run.run.stats["draft_passes"] for run in one) / sum(
            run.run.stats["steps"] for run in one
        )
        if row.name in variants:
            line["tree"] = vars(variants[row.name].tree)
        lines.append(line)
    return lines


def step_seconds(run: Timed) -> float:
    """Of one step, prefill left out."""
    stats = run.run.stats
    return (stats["total_seconds"] - stats["seconds"].get("prefill", 0.0)) / stats["steps"]


# ---------------------------------------------------------------- the report


def table(group: str, lines: Sequence[dict]) -> str:
    headings = [group, "tokens/s", "over plain", "tokens/step", "draft passes/step", "ms/step", "same output"]
    rows = []
    for line in lines:
        ratio = "-" if line["over_plain"] is None else f"{line['over_plain']:.2f}x"
        cells = [f"{line['tokens_per_second']:.0f}", ratio, f"{line['tokens_per_step']:.2f}"]
        cells += [f"{line['draft_passes']:.2f}", f"{1e3 * line['step_seconds']:.3f}"]
        rows.append([line["name"], *cells, "yes" if line["identical"] else "NO"])
    return markdown(headings, rows)


def gains(lines: Sequence[dict]) -> list[tuple[int, str, dict, dict]]:
    """Nodes, passes ("best": each with those that it is fastest with), and the lines of tree and staged, for all nodes
    that both have."""
    found: dict[int, dict[str, dict[str, dict]]] = {}
    for line in lines:
        if line["name"] != BASELINE:
            mode, nodes, passes = line["name"].split(", ")
            found.setdefault(int(nodes.split()[0]), {}).setdefault(passes.split()[0], {})[mode] = line
    result = []
    for nodes, by_passes in found.items():
        both = {passes: lines for passes, lines in by_passes.items() if len(lines) == 2}
        result += [(nodes, passes, lines["tree"], lines["staged"]) for passes, lines in both.items()]
        if both:
            best = (max((lines[mode] for lines in both.values()), key=_speed) for mode in ("tree", "staged"))
            result.append((nodes, "best", *best))
    return result


def _speed(line: dict) -> float:
    return line["tokens_per_second"]


def gain_table(lines: Sequence[dict]) -> str:
    """Staged over tree, a line for each number of nodes and passes."""
    headings = [
        "nodes",
        "passes",
        "tree, tokens/s",
        "staged, tokens/s",
        "staged over tree",
        "tokens/step: tree",
        "staged",
    ]
    rows = []
    for nodes, passes, tree, staged in gains(lines):
        cells = [f"{_speed(tree):.0f}", f"{_speed(staged):.0f}", f"{_speed(staged) / _speed(tree):.2f}x"]
        cells += [f"{line['tokens_per_step']:.2f}" for line in (tree, staged)]
        rows.append([str(nodes), passes, *cells])
    return markdown(headings, rows)


def summary(report: dict) -> str:
    """What was measured, as Markdown."""
    settings, prompts, found = report["settings"], report["prompts"], report["groups"]
    parts = [
        f"`{report['command']}`  \n{where(report)}  \n{prompts['used']} prompts of `{prompts['file']}`, greedy, "
        f"{settings['max_new_tokens']} new tokens, {settings['dtype']}. The base tree: {settings['base']}."
    ]
    if "staged" in found:
        parts.append(
            "The staged gain alone: staged over tree, which is the same tree without the n-grams' guesses. Best: each "
            "with the passes that it is fastest with."
        )
        parts.append(gain_table(found["staged"]))
    parts += [table(group, lines) for group, lines in found.items()]
    if "nodes" in found:
        parts.append("![Tokens a second over nodes and draft passes](figures/ablation.svg)")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=8, max_new_tokens=128)
    parser.add_argument("--tree", type=Path, help="trees that `stagedspec tune-tree` wrote: the base is its staged one")
    parser.add_argument("--drafts", nargs="+", default=[], help="other drafts: hub ids or folders")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further group after so long")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ablation", help="folder to write to")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured before")
    parser.add_argument("--update-readme", action="store_true", help="also write bench/README.md and its figure")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def bench(options: argparse.Namespace, arguments: list[str], console: Console) -> bool:
    """Measures, writes and prints everything. Returns whether all outputs agree. Raises ValueError for bad input."""
    began = time.perf_counter()
    models = load(options)
    if models.draft is None:
        raise ValueError("an ablation is of a draft's trees: give --draft")
    decoder = models.decoder
    encoded, _ = encode(read_prompts(options.prompts), models.tokenizer, models.positions - options.max_new_tokens,
                        options.limit)  # fmt: skip
    base = decoder.tree_for("staged")
    drafts = {
        f"draft {Path(name).name}": stagedspec.Decoder.from_pretrained(
            options.target, name, options.ngram, device=options.device, dtype=options.dtype, backend=options.backend
        )
        for name in options.drafts
    }
    if drafts:
        drafts = {"the draft": decoder, **drafts}
    report = header("ablation.py", arguments, decoder.device) | {
        "prompts": {"file": options.prompts.name, "used": len(encoded)},
        "settings": {"max_new_tokens": options.max_new_tokens, "dtype": options.dtype, "base": str(base)},
    }
    key = {name: report[name] for name in ("versions", "machine", "settings")}
    key |= {"prompts": [prompt_hash(prompt) for prompt in encoded], "drafts": options.drafts}
    key |= {"models": models.fingerprint(), "code": code_fingerprint()}
    journal = Journal(options.out / "runs.jsonl", key, options.fresh)
    done = {(entry["group"], entry["part"]): entry["lines"] for entry in journal.entries}
    report["groups"] = {}
    for group, part, variants in parts(groups(models, base, drafts)):
        if (group, part) not in done:
            if done and time.perf_counter() - began > options.seconds:
                console.print(f"left out, time is over: {group}: {', '.join(variants)}", highlight=False)
                continue
            done[group, part] = measured(variants, decoder, encoded, group, options.max_new_tokens)
            journal.add(group=group, part=part, lines=done[group, part])
            decoder.release()
        # Plain decoding once, as beside the first part.
        report["groups"].setdefault(group, done[group, part][:1]).extend(done[group, part][1:])
    done = report["groups"]
    report["identical"] = all(line["identical"] for lines in done.values() for line in lines)

    written = figures.ablation(done["nodes"], options.out / "ablation") if "nodes" in done else []
    text = summary(report)
    write_text(options.out / "ablation.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "ablation.md", text.replace("figures/", "") + "\n")
    if options.update_readme:
        update_readme("ablation", text, [path for path in written if path.suffix != ".png"])
    console.print(f"{text}\nwritten to {options.out}", highlight=False, soft_wrap=True)
    return report["identical"]


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = arguments_of(arguments)
    same = bench(parse(arguments), arguments, Console())
    if not same:
        print("OUTPUTS DIFFER from autoregressive decoding: this is a bug, please report it", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
