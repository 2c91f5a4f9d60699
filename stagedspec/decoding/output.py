"""`StagedOutput`: what `generate` returns with return_dict_in_generate=True."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from stagedspec.decoding.request import Call
from stagedspec.decoding.stats import Stats


@dataclass
class StagedOutput(GenerateDecoderOnlyOutput):
    """Sequences, scores and statistics of one `generate`.

    sequences: LongTensor [B, prompt + new]. scores, logits: with output_scores and output_logits, a tuple of one tensor
    fp32 [B, V] for each new position, after and before processing; zeros in rows that have stopped (transformers has
    there what the model predicts after padding). stats: statistics of the generation.
    """

    stats: Stats | None = None


def finish(call: Call, sequences: torch.Tensor, stats: Stats) -> torch.Tensor | StagedOutput:
    """Ends the streamer, and returns what `generate` returns.

    sequences: LongTensor [B, prompt + new].
    """
    callbacks = call.callbacks
    if callbacks is not None and callbacks.streamer is not None:
        callbacks.streamer.end()
    if not call.return_dict:
        return sequences
    count = sequences.shape[1] - call.input_ids.shape[1]
    kept: dict[str, Any] = {"sequences": sequences}
    if callbacks is not None:
        kept |= {name: tuple(values[:count]) for name, values in callbacks.kept.items()}
    return StagedOutput(**kept, stats=stats)
