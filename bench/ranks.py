"""Measures the acceptance profiles of planning/cost.py, as `stagedspec tune-tree` does: how often the target takes
the draft's first, second, ... child, how often draft² names the draft's first child, and the mixture fitted to both.

    python bench/ranks.py [--skip 32] [--limit 64] [--max-new-tokens 96] [TRIO OPTIONS]

The benchmark uses the first 32 prompts of the file, so these are skipped here.
"""

import argparse
import sys
from pathlib import Path

from sides import clear_errors
from stagedspec import Decoder
from stagedspec.planning.cost import CHILDREN
from stagedspec.tuning.prompts import read_prompts
from stagedspec.tuning.trees import fit_profile, outcomes


@clear_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target"), parser.add_argument("--draft"), parser.add_argument("--ngram")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--skip", type=int, default=32)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    if options.target:
        decoder = Decoder.from_pretrained(options.target, options.draft, options.ngram, device="cpu")
    else:
        decoder = Decoder.default(device="cpu")
    if decoder.draft is None or decoder.tokenizer is None:
        raise ValueError("a draft and a tokenizer are needed: give --draft, and a --target with a tokenizer")
    chosen = read_prompts(options.prompts)[options.skip : options.skip + options.limit]
    prompts = [decoder.tokenizer(text, add_special_tokens=False).input_ids for text in chosen]
    for sampled in (False, True):
        texts = [outcomes(decoder, prompt, options.max_new_tokens, sampled, n) for n, prompt in enumerate(prompts)]
        every = [outcome for text in texts for outcome in text]
        ranks = [round(sum(rank == r for rank, _ in every) / len(every), 3) for r in range(CHILDREN)]
        named = round(sum(named for _, named in every) / len(every), 3)
        print("sampled" if sampled else "greedy", {"ranks": ranks, "prefetch_hit": named})
        for kind in fit_profile(texts):
            print("   ", kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
