"""Bulk sampling of a model into shards of token ids, by our own decoder in large batches.

The paper distils the draft on text of the target and fits the n-gram on text of the draft (arXiv 2308.04623, sections
3.2 and 4). A shard depends only on the settings and its index, so sampling can be killed and resumed at any time.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from stagedspec.decoder import Decoder
from stagedspec.decoding.limits import MAX_PLAIN_BATCH
from stagedspec.kernels.common.files import replacing


def prompt_rows(corpus: torch.Tensor, rows: int, longest: int, end_of_text: int | None, seed: int) -> torch.Tensor:
    """Prompts of one length, drawn from 1 to `longest` by the seed: LongTensor [rows, length].

    A quarter of the rows start a text (end of text, then its beginning), if the corpus [T] has that token; the rest
    start anywhere in it.
    """
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    starts = torch.randint(max(1, len(corpus) - length), (rows,), generator=generator)
    texts = (
        torch.empty(0) if end_of_text is None else (corpus[: 1 - length or None] == end_of_text).nonzero().squeeze(1)
    )
    if len(texts):
        picked = texts[torch.randint(len(texts), (rows,), generator=generator)]
        starts[: rows // 4] = picked[: rows // 4]
    return corpus[starts[:, None] + torch.arange(length)]


def cut(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Logits [..., V] with all but the top_k best at -inf; None: as they are."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))


def sample_rows(
    decoder: Decoder,
    prompts: torch.Tensor,
    length: int,
    temperature: float,
    seed: int,
    top_k: int | None = None,
    together: int = MAX_PLAIN_BATCH,
) -> torch.Tensor:
    """Continues prompts [rows, p] to LongTensor [rows, length] by sampling, also after an end-of-text token.

    together: rows decoded in one batch. A row depends on its prompt, the seed and its index alone, not on the batch.
    """
    done = []
    for part in torch.arange(len(prompts)).split(together):
        rows = decoder.generate(
            prompts[part],
            max_new_tokens=length - prompts.shape[1],
            mode="autoregressive",
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=[],
            seed=[seed * len(prompts) + int(row) for row in part],
        )
        done.append(cast(torch.Tensor, rows).cpu())
    return torch.cat(done)


def sample_shards(
    decoder: Decoder,
    tokens_wanted: int,
    temperature: float | Sequence[float],
    folder: Path,
    corpus: torch.Tensor,
    batch: int = 64,
    length: int = 256,
    longest_prompt: int = 16,
    seed: int = 0,
    report: Callable[[dict], None] = lambda values: None,
    top_k: int | None = None,
    seconds: float = math.inf,
    together: int = MAX_PLAIN_BATCH,
) -> Iterator[torch.Tensor]:
    """Samples until there are `tokens_wanted` tokens, or time is over.

    Yields shards, LongTensor [batch, length] each, in order.

    Shard i is `folder/shard-<i>.safetensors`: int32 `tokens` and the settings; one that exists is loaded, not sampled.
    decoder:     of the model that is sampled, on the device and in the dtype to sample with.
    temperature: one, or several that the shards take in turn.
    corpus:      LongTensor [T] that the prompts are taken from; rows begin with their prompt, of at most
                 `longest_prompt` tokens.
    length:      tokens a row, the prompt included; at most the model's n_positions.
    top_k:       draw among this many best tokens; None: among all.
    together:    rows decoded in one batch, at most 64; tokens do not depend on it.
    seconds:     after so many no further shard is begun, from the second on.
    report:      called with a dict after each shard: step and steps (shards), seconds, tokens_per_second (new tokens).

    Raises ValueError for invalid settings, or a folder whose shards are damaged or of other settings.
    """
    temperatures = list(temperature) if isinstance(temperature, Sequence) else [temperature]
    limit = decoder.target.positions
    if tokens_wanted < 1 or batch < 1:
        raise ValueError(f"tokens_wanted and batch must be at least 1, got {tokens_wanted} and {batch}")
    if not 1 <= longest_prompt < length <= limit:
        raise ValueError(
            f"length must be above longest_prompt and at most n_positions = {limit}, and longest_prompt at least "
            f"1; got length {length} and longest_prompt {longest_prompt}"
        )
    if not temperatures or not all(0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures must be positive numbers, got {temperatures}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if not 1 <= together <= MAX_PLAIN_BATCH:
        raise ValueError(f"together must be from 1 to {MAX_PLAIN_BATCH} rows, got {together}")
    if len(corpus) <= longest_prompt:
        raise ValueError(f"the corpus has {len(corpus)} tokens, not more than a prompt of {longest_prompt}")
    return _shards(
        decoder,
        tokens_wanted,
        temperatures,
        Path(folder),
        corpus,
        batch,
        length,
        longest_prompt,
        seed,
        report,
        top_k,
        seconds,
        together,
    )


def _shards(
    decoder: Decoder,
    tokens_wanted: int,
    temperatures: Sequence[float],
    folder: Path,
    corpus: torch.Tensor,
    batch: int,
    length: int,
    longest_prompt: int,
    seed: int,
    report: Callable[[dict], None],
    top_k: int | None,
    seconds: float,
    together: int,
) -> Iterator[torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    count = -(-tokens_wanted // (batch * length))
    end_of_text = next(iter(decoder.eos_token_ids), None)  # a model that was trained here has one at most
    for index in range(count):
        path = folder / f"shard-{index:05d}.safetensors"
        shard_seed = seed * 1_000_003 + index
        settings = {
            "temperature": temperatures[index % len(temperatures)],
            "seed": shard_seed,
            "rows": batch,
            "length": length,
            "longest_prompt": longest_prompt,
        } | ({} if top_k is None else {"top_k": top_k})
        if path.exists():
            yield _load(path, decoder.target.vocab_size, settings)
            continue
        if index and time.perf_counter() - began > seconds:
            return
        start = time.perf_counter()
        prompts = prompt_rows(corpus, batch, longest_prompt, end_of_text, shard_seed)
        rows = sample_rows(decoder, prompts, length, settings["temperature"], shard_seed, top_k, together)
        with replacing(path) as part:
            save_file({"tokens": rows.int()}, part, metadata={"settings": json.dumps(settings)})
        taken = time.perf_counter() - start
        rate = batch * (length - prompts.shape[1]) / taken
        report({"step": index + 1, "steps": count, "seconds": taken, "tokens_per_second": rate})
        yield rows


def load_shards(folder: Path, vocab_size: int | None = None) -> Iterator[torch.Tensor]:
    """The shards of a folder in order, LongTensor [rows, length] each.

    vocab_size: token ids must be below it, if given.
    Raises ValueError if there are none or one is damaged.
    """
    paths = sorted(Path(folder).glob("shard-*.safetensors"))
    if not paths:
        raise ValueError(f"there are no shards in {folder}: sample first")
    return (_load(path, vocab_size) for path in paths)


def _load(path: Path, vocab_size: int | None = None, settings: dict | None = None) -> torch.Tensor:
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("settings", "null"))
        tokens = load_file(path).get("tokens")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to sample it again") from error
    if tokens is None or tokens.dtype != torch.int32 or tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"{path} holds no int32 `tokens` [rows, length]; remove it to sample it again")
    if settings is not None and stored != settings:
        raise ValueError(
            f"{path} was sampled with {stored}, not {settings}: remove the folder or use the same settings"
        )
    if tokens.min() < 0 or (vocab_size is not None and tokens.max() >= vocab_size):
        raise ValueError(f"{path} holds token ids outside 0 to {vocab_size}; remove it to sample it again")
    return tokens.long()
