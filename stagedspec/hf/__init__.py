"""Works beside transformers: `custom_generate` lets a transformers model decode by staged speculative decoding.

    out = hf_model.generate(**inputs, custom_generate=stagedspec.hf.custom_generate(draft="distilgpt2"))

`Decoder.generate` takes the same arguments. They mean what they mean to transformers, with three exceptions that are
always named: settings of other algorithms (beams, ...) are refused; so is what only the model's own forward pass could
give (attentions, hidden states, the cache); and sampled tokens are drawn from the same distribution as transformers',
by other random numbers. `stagedspec.decoding.settings` lists every setting and what becomes of it.
"""

from stagedspec.decoding.decoder_cache import forget
from stagedspec.decoding.output import StagedOutput
from stagedspec.hf.custom_generate import custom_generate, decoder_for

__all__ = ["StagedOutput", "custom_generate", "decoder_for", "forget"]
