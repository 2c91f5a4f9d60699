"""Measures what the stretches of stagedspec/cost.py average to: how often the target takes the draft's first, second,
... child, and how often draft² names the draft's first child.

    python bench/ranks.py [--skip 32] [--limit 64] [--max-new-tokens 96] [--fit] [TRIO OPTIONS]

At every position of the target's own greedy and sampled (top-k 50, T=1) text the draft ranks its children under the
noise of that position. The benchmark uses the first 32 prompts of the file, so these are skipped here. These are the
means; --fit also decodes with every one of TREES and splits the means into easy, middling and hard stretches, so that
tokens and draft passes a step come out as counted. Its result is what stands in STRETCHES.
"""

import argparse
import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import torch

from stagedspec import Decoder, TreeConfig, cost
from stagedspec.cost import CHILDREN
from stagedspec.gpt2 import Cache
from stagedspec.kernels.reference import Batch, NoiseAt

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
# (nodes, depth, passes, width, children, prefetch, prefetch_width, node_floor, pass_floor): chains, trees and staged
# trees, small and large, with floors and without.
TREES = [
    TreeConfig(*settings)
    for settings in (
        (2, 1, 1, 1, 8, 0, 1),
        (4, 1, 1, 1, 8, 0, 1),
        (3, 2, 2, 1, 1, 0, 1),
        (5, 4, 4, 1, 1, 0, 1),
        (5, 4, 4, 1, 1, 0, 1, 0.0, 0.5),
        (8, 3, 3, 1, 8, 0, 1),
        (8, 3, 3, 1, 8, 0, 1, 0.06, 0.65),
        (16, 4, 4, 2, 8, 0, 1),
        (4, 3, 1, 1, 8, 2, 1),
        (8, 5, 1, 1, 8, 4, 1),
        (8, 9, 1, 1, 8, 8, 1, 0.06, 0.0),
        (6, 4, 2, 1, 8, 1, 1),
        (8, 10, 2, 1, 8, 4, 1, 0.0, 0.65),
        (12, 10, 2, 1, 8, 4, 1, 0.03, 0.8),
        (12, 14, 2, 1, 8, 6, 1, 0.06, 0.5),
        (16, 9, 3, 1, 8, 2, 1),
        (16, 15, 3, 1, 8, 4, 1, 0.03, 0.65),
        (24, 20, 4, 1, 8, 4, 1, 0.03, 0.5),
    )
]
EASY, EASY_HIT = 0.995, 0.98  # text that repeats itself: given, not fitted


def ranks_of(decoder: Decoder, prompts: list[list[int]], new_tokens: int, sampled: bool) -> dict:
    """Shares over all new tokens of the prompts: of every rank, and of the first children that draft² names."""
    draft, table = decoder.draft, decoder.ngram
    warping = {key: value for key, value in SAMPLED.items() if key != "do_sample"} if sampled else None
    hits, guessed, total = torch.zeros(CHILDREN), 0, 0
    for seed, prompt in enumerate(prompts):
        options = {"seed": seed, **(SAMPLED if sampled else {})}
        row = decoder.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, mode="autoregressive", eos_token_id=[], **options
        )[0]
        start, count = len(prompt) - 1, len(row) - 1
        with torch.inference_mode():
            cache = Cache(draft, 1, 0, count)
            positions = torch.arange(count)[None]
            bias = draft.ops.causal_bias(0, count, draft.device, draft.kv_dtype)
            hidden = draft.forward(Batch(row[None, :-1], positions, [], bias), cache, 0)[:, start:]
            noise = None
            if sampled:
                counters = torch.tensor([seed]), torch.tensor([0])
                values = draft.ops.gumbel_noise(*counters, positions[:, start:] + 1, draft.vocab_size)
                noise = NoiseAt(values, torch.arange(count - start)[None])
            children, _ = draft.ops.choose_children(draft.logits(hidden), CHILDREN, warping, noise)
        tokens = row.tolist()
        hits += (children[0] == row[start + 1 :, None]).sum(0)
        follower = dict(zip(pairwise(tokens[: start + 1]), tokens[2 : start + 1], strict=False))
        for index, names in enumerate(children[0, :, 0].tolist()):
            first, last = tokens[start + index - 1] if start + index else -1, tokens[start + index]
            options = table.successors_of(first, last) if table is not None else []
            found = follower.get((first, last))
            scored = ([] if found is None else [(found, -0.25)]) + [pair for pair in options if pair[0] != found]
            if noise is not None:
                scored = [(token, score + noise.values[0, index, token].item()) for token, score in scored]
            guessed += bool(scored) and max(scored, key=lambda pair: pair[1])[0] == names
            follower[first, last] = tokens[start + index + 1]
        total += count - start
    return {"ranks": [round(share, 3) for share in (hits / total).tolist()], "prefetch_hit": round(guessed / total, 3)}


def counted(decoder: Decoder, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[tuple[float, float]]:
    """Tokens and draft passes a step with each of TREES, over all prompts."""
    options = SAMPLED if sampled else {}
    result = []
    for tree in TREES:
        tokens = passes = steps = 0
        for seed, prompt in enumerate(prompts):
            decoder.generate(
                torch.tensor([prompt]), max_new_tokens=new_tokens, eos_token_id=[], seed=seed, tree=tree, **options
            )
            stats = decoder.last_stats
            tokens, passes, steps = tokens + stats.new_tokens, passes + stats.draft_passes, steps + stats.steps
        result.append((tokens / steps, passes / steps))
    return result


def split(means: dict, easy: float, hard: float, first: float, spread: float) -> tuple | None:
    """Stretches that average to `means`, or None where there are none.

    easy, hard: shares of the text. first: how often the target takes the draft's first child in the middling rest.
    spread: the middling stretch's share of what the further children take, beside an equal one.
    """
    ranks, middling = means["ranks"], 1 - easy - hard
    last = (ranks[0] - easy * EASY - middling * first) / hard
    if min(easy, hard, middling) < 0.02 or not 0 < last < first < EASY:
        return None
    rest = [max(0.0, share - easy * (1 - EASY) * 0.5**rank) for rank, share in enumerate(ranks[1:], 1)]
    of_middling = [share * spread / (hard + middling * spread) for share in rest]
    of_hard = [share / (hard + middling * spread) for share in rest]
    if first + sum(of_middling) > 1 or last + sum(of_hard) > 1:
        return None
    hit = min(max((means["prefetch_hit"] - easy * EASY_HIT) / (1 - easy), 0.0), 1.0)
    easiest = [EASY, *((1 - EASY) * 0.5**rank for rank in range(1, len(ranks)))]
    shapes = (easy, easiest, EASY_HIT), (middling, [first, *of_middling], hit), (hard, [last, *of_hard], hit)
    return tuple((round(s, 2), tuple(round(r, 3) for r in rates), round(h, 2)) for s, rates, h in shapes)


def error(stretches: tuple, counts: list[tuple[float, float]], sampled: bool) -> float:
    """Mean squared logarithm of predicted over counted tokens and, a quarter as heavy, passes a step."""
    cost.STRETCHES[sampled] = stretches
    cost._grown.cache_clear()
    total = 0.0
    for tree, wanted in zip(TREES, counts, strict=True):
        for weight, given, right in zip((1.0, 0.25), predicted(tree, sampled), wanted, strict=True):
            total += weight * math.log(given / right) ** 2
    return total / len(TREES)


def predicted(tree: TreeConfig, sampled: bool) -> tuple[float, float]:
    """Tokens and draft passes a step by the cost model."""
    kinds = cost.expected(tree, sampled)
    return sum(kind.share * kind.tokens for kind in kinds), sum(kind.share * kind.passes for kind in kinds)


def fit(means: dict, counts: list[tuple[float, float]], sampled: bool, trials: int = 400) -> tuple:
    """The split with the least error: random search that narrows around the best."""
    rng = random.Random(0)
    best, best_error, centre = None, math.inf, None
    for trial in range(trials):
        if centre is None or trial < trials // 3:
            point = rng.uniform(0.02, 0.9), rng.uniform(0.05, 0.9), rng.uniform(0.2, 0.98), rng.uniform(0.1, 1.5)
        else:
            width = 0.15 * 0.05 ** (trial / trials)
            point = tuple(max(0.0, value + rng.gauss(0, width)) for value in centre)
        found = split(means, *point)
        if found is not None:
            value = error(found, counts, sampled)
            if value < best_error:
                best, best_error, centre = found, value, point
    if best is None:
        raise ValueError(f"no split of {means} into three stretches: measure more text (--limit, --max-new-tokens)")
    error(best, counts, sampled)  # leaves the best in the cost model
    return best


def print_fit(stretches: tuple, counts: list[tuple[float, float]], sampled: bool) -> None:
    for stretch in stretches:
        print(f"        {stretch},")
    for tree, (tokens, passes) in zip(TREES, counts, strict=True):
        given, runs = predicted(tree, sampled)
        print(f"  {given:5.2f} tokens ({tokens:5.2f} counted) {runs:5.2f} passes ({passes:5.2f})  {tree}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target"), parser.add_argument("--draft"), parser.add_argument("--ngram")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--skip", type=int, default=32)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--fit", action="store_true", help="fit the stretches: minutes")
    options = parser.parse_args()
    try:
        if options.target:
            decoder = Decoder.from_pretrained(options.target, options.draft, options.ngram, device="cpu")
        else:
            decoder = Decoder.default(device="cpu")
        if decoder.draft is None or decoder.tokenizer is None:
            raise ValueError("a draft and a tokenizer are needed: give --draft, and a --target with a tokenizer")
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        chosen = [json.loads(line)["prompt"] for line in lines[options.skip : options.skip + options.limit]]
        prompts = [decoder.tokenizer(text, add_special_tokens=False).input_ids for text in chosen]
        for sampled in (False, True):
            means = ranks_of(decoder, prompts, options.max_new_tokens, sampled)
            print("sampled" if sampled else "greedy", means, flush=True)
            if options.fit:
                counts = counted(decoder, prompts, options.max_new_tokens, sampled)
                print_fit(fit(means, counts, sampled), counts, sampled)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
