"""Writes prompts for the benchmarks from the held-out part of a training run's corpus.

    python bench/make_prompts.py RUN_FOLDER [--out bench/prompts.jsonl] [--count 128]

RUN_FOLDER is what `stagedspec train` writes: corpus.safetensors and tokenizer/. Nothing is random: the same corpus
gives the same prompts. Each is a run of whole lines of one held-out document, of 32 to 128 tokens, taken from documents
spread evenly over the held-out part.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sides import clear_errors
from stagedspec.kernels.common.files import write_text
from stagedspec.training.corpus import Corpus

SHORTEST, LONGEST = 32, 128  # tokens


def documents(heldout: list[int], end_of_text: int) -> list[list[int]]:
    """Splits token ids at the end-of-text token."""
    result: list[list[int]] = [[]]
    for token in heldout:
        if token == end_of_text:
            result.append([])
        else:
            result[-1].append(token)
    return [document for document in result if document]


def prompt_from(text: str, index: int, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Whole lines of `text`, 32 to 128 tokens of them, or None where there are none.

    index: decides where in the document the lines are taken and how many tokens are aimed at, so that prompts differ.
    """
    lines = text.splitlines(keepends=True)
    aim = SHORTEST + (index * 37) % (LONGEST - SHORTEST + 1)
    first = (index * 7919) % max(1, len(lines) // 2)
    while first < len(lines) and not lines[first].strip():
        first += 1
    best, prompt = None, ""
    for line in lines[first:-1]:  # not to the end of the document: something must be left to complete
        prompt += line
        length = len(tokenizer.encode(prompt, add_special_tokens=False))
        if length > LONGEST:
            break
        if length >= SHORTEST:
            best = prompt
        if length >= aim:
            break
    return best


def make_prompts(run: Path, count: int) -> list[str]:
    """At most `count` prompts, every one different.

    Raises ValueError if the folder is no training run or its held-out part is too small for a single prompt.
    """
    for name in ("corpus.safetensors", "tokenizer"):
        if not (run / name).exists():
            raise ValueError(f"{run} has no {name}; expected the folder that `stagedspec train` wrote")
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    heldout = Corpus.load(run / "corpus.safetensors").heldout.tolist()
    texts = [tokenizer.decode(document) for document in documents(heldout, tokenizer.eos_token_id)]
    # Once round takes documents evenly spread; further rounds take other lines of them, until there are enough.
    prompts: dict[str, None] = {}
    stride = max(1, len(texts) // count)
    order = [i for start in range(stride) for i in range(start, len(texts), stride)]
    for round_index in range(8):
        for position in order:
            if len(prompts) == count:
                return list(prompts)
            prompt = prompt_from(texts[position], position + round_index * len(texts), tokenizer)
            if prompt is not None:
                prompts[prompt] = None
    if not prompts:
        raise ValueError(f"{run}: no held-out document has {SHORTEST} tokens of whole lines")
    return list(prompts)


@clear_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder written by `stagedspec train`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--count", type=int, default=128)
    options = parser.parse_args()
    if options.count < 1:
        raise ValueError(f"--count must be positive, got {options.count}")
    prompts = make_prompts(options.run, options.count)
    lines = (json.dumps({"prompt": prompt, "source": "held-out"}) + "\n" for prompt in prompts)
    write_text(options.out, "".join(lines))
    print(f"{len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
