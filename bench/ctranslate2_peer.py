"""CTranslate2 as a side of a comparison on a CPU: plain decoding, fp32 or with int8 weights. Optional: `pip install
ctranslate2`."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from stagedspec.tuning.compare import Run

FP32, INT8 = "CTranslate2", "CTranslate2 int8"
TYPES = {FP32: "float32", INT8: "int8"}


def installed() -> bool:
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        return False
    return True


def ctranslate2_side(model: GPT2LMHeadModel, settings: dict, kind: str) -> Callable[..., Run]:
    """Plain decoding with one thread or as many as torch has, whichever is faster here. Tokens go in and out as their
    numbers, so no tokenizer is asked."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        _convert(model, Path(folder))
        generators = [
            ctranslate2.Generator(
                folder, device="cpu", compute_type=TYPES[kind], inter_threads=1, intra_threads=threads
            )
            for threads in sorted({1, torch.get_num_threads()})
        ]
    generator = min(generators, key=_seconds)
    options = {"sampling_topk": 1}
    if settings["do_sample"]:
        options = {"sampling_topk": settings["top_k"] or 0, "sampling_temperature": settings["temperature"]}

    def run(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Run:
        if settings["do_sample"]:
            ctranslate2.set_random_seed(settings["seed"])
        real = torch.ones_like(ids) if mask is None else mask
        prompts = [[str(token) for token in row[kept.bool()].tolist()] for row, kept in zip(ids, real, strict=True)]
        found = generator.generate_batch(
            prompts, max_length=settings["max_new_tokens"], end_token=[], include_prompt_in_result=False, **options
        )
        tokens = [token for result in found for token in result.sequences_ids[0]]
        return Run(tokens, {"steps": len(tokens), "target_passes": len(tokens) // len(ids), "draft_passes": 0})

    return run


def _seconds(generator: Any) -> float:
    """The median of five short generations."""

    def once() -> float:
        begin = time.perf_counter()
        generator.generate_batch([["1"]], max_length=32, end_token=[], sampling_topk=1)
        return time.perf_counter() - begin

    return statistics.median(once() for _ in range(5))


def _convert(model: GPT2LMHeadModel, folder: Path) -> None:
    """Writes a model in CTranslate2's format. A token's name is its number."""
    from ctranslate2.converters.transformers import GPT2Loader

    names = {str(token): token for token in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")
    spec = GPT2Loader()(model, tokenizer)
    spec.validate()
    spec.optimize()
    spec.save(str(folder))
