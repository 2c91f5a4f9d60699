"""What `generate` returns."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from stagedspec.decoding.request import Call
from stagedspec.decoding.stats import Stats


@dataclass
class StagedOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with return_dict_in_generate=True.

    sequences: LongTensor [B, prompt + new]. scores, logits: where asked for, a tensor fp32 [B, V] for each new
    position, after and before processing; zeros in rows that have stopped (transformers leaves there what the model
    says after padding). stats: what the generation cost.
    """

    stats: Stats | None = None


def finish(call: Call, sequences: torch.Tensor, stats: Stats) -> torch.Tensor | StagedOutput:
    """Ends the stream, and makes what `generate` returns."""
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
