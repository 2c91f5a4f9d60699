"""Measures what the stretches of stagedspec/cost.py average to: how often the target takes the draft's first, second,
... child, and how often draft² names the draft's first child.

    python bench/ranks.py [--skip 32] [--limit 64] [--max-new-tokens 96] [TRIO OPTIONS]

At every position of the target's own greedy and sampled (top-k 50, T=1) text the draft ranks its children under the
noise of that position. The benchmark uses the first 32 prompts of the file, so these are skipped here.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import torch

from stagedspec import Decoder
from stagedspec.cost import CHILDREN
from stagedspec.gpt2 import Cache
from stagedspec.kernels.reference import Batch, NoiseAt

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target"), parser.add_argument("--draft"), parser.add_argument("--ngram")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--skip", type=int, default=32)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
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
            print("sampled" if sampled else "greedy", ranks_of(decoder, prompts, options.max_new_tokens, sampled))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
