"""Tables of all settings of transformers' `generate`: honoured, without effect on the tokens, or refused.

A setting that changes the output is never ignored. A setting that a later release of transformers adds is refused until
it is in one of these tables (tests/hf/test_hf.py compares them with the installed `GenerationConfig`).
"""

from functools import lru_cache
from typing import Any

from transformers import GenerationConfig

from stagedspec.models.plain_gpt2 import OWN_GENERATE as _OWN
from stagedspec.values import plain

HONOURED = {
    "length": ("max_length", "max_new_tokens"),
    "choice": ("do_sample", "temperature", "top_k", "top_p", "min_p"),
    "special tokens": ("eos_token_id", "pad_token_id", "bos_token_id"),
    "output": ("return_dict_in_generate", "output_scores", "output_logits"),
    "proposals": ("prompt_lookup_num_tokens",),
    # transformers makes these into logits processors, which are called at every position.
    "logits processors": (
        "min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens",
        "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values",
        "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config", "renormalize_logits",
    ),
    "stopping criteria": ("max_time", "stop_strings"),
}  # fmt: skip

# Without effect on the tokens.
IRRELEVANT = {
    "how transformers runs the model": (
        "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
        "low_memory", "continuous_batching_config",
    ),
    "how a draft is run, which the cost model decides here": (
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_early_exit", "use_mtp", "speculation_type",
    ),
    "drafts with another tokenizer, which are refused": ("assistant_lookbehind", "target_lookbehind"),
    "beams, which are refused": ("early_stopping", "length_penalty"),
    "encoder-decoder models, which are refused": ("decoder_start_token_id",),
    "notes": ("transformers_version",),
}  # fmt: skip

_CACHE = ("cache", "past_key_values")  # the KV cache's name from transformers 5.24 on, and before
# name: (values that have no effect, what to use instead)
REFUSED: dict[str, tuple[tuple, str]] = {
    "num_beams": ((None, 1), f"sample, or {_OWN}"),
    "num_beam_groups": ((None, 1), f"sample, or {_OWN}"),
    "diversity_penalty": ((None, 0.0), f"sample, or {_OWN}"),
    "num_return_sequences": ((None, 1), "repeat the prompt in the batch: every row samples by itself"),
    "constraints": ((None,), f"use a logits processor, or {_OWN}"),
    "force_words_ids": ((None,), f"use sequence_bias or a logits processor, or {_OWN}"),
    "penalty_alpha": ((None, 0.0), f"use repetition_penalty, or {_OWN}"),
    "dola_layers": ((None,), _OWN),
    "guidance_scale": ((None, 1, 1.0), _OWN),
    "token_healing": ((None, False), "cut the prompt back with the model's heal_tokens before generating"),
    "assistant_ensemble_weight": ((None,), "leave it out: decoding here is lossless"),
    "is_assistant": ((None, False), "leave it out: this decoder cannot be another model's assistant"),
    "output_attentions": ((None, False), "run the model on the finished sequences: model(ids, output_attentions=True)"),
    "output_hidden_states": (
        (None, False),
        "run the model on the finished sequences: model(ids, output_hidden_states=True)",
    ),
    "cache_implementation": (
        (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid"),
        "leave it out: the cache here is static and exact",
    ),
}

# Arguments of `generate` and of the model's forward that are not settings: name -> what to do instead.
REFUSED_ARGUMENTS = {
    "inputs_embeds": "give input_ids",
    **dict.fromkeys(_CACHE, "give the whole sequence as input_ids: the prefix is computed again"),
    "token_type_ids": (
        "leave it out (call the tokenizer with return_token_type_ids=False): GPT-2 would add the embedding of a token "
        f"to every position. If your model was trained so, {_OWN}"
    ),
    "encoder_hidden_states": _OWN,
    "encoder_attention_mask": _OWN,
    "negative_prompt_ids": _OWN,
    "negative_prompt_attention_mask": _OWN,
    "assistant_tokenizer": "give a draft of the target's own vocabulary",
    "synced_gpus": "run one decoder a process",
    "custom_generate": "leave it out: this is one",
}
# Arguments that transformers passes on to the model and that have no effect here.
_PASSED_ON = ("attention_mask", "use_cache", "logits_to_keep", "cache_position", "return_dict", "labels")

_KNOWN = {name for group in (HONOURED, IRRELEVANT) for names in group.values() for name in names} | REFUSED.keys()


def refuse_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for the first setting that is not supported, with what to use instead.

    Names that the installed `GenerationConfig` does not have are ignored, as transformers does.
    """
    for name, (neutral, instead) in REFUSED.items():
        value = plain(settings.get(name))
        if not any(value is known or (type(value) is type(known) and value == known) for known in neutral):
            raise ValueError(f"{name}={value!r} is not supported: {instead}")
    fields, defaults = _fields_and_defaults()
    for name, value in settings.items():
        if name in _KNOWN or name not in fields or name.startswith("_"):
            continue
        if value is not None and value is not False and value != defaults.get(name):
            raise ValueError(f"{name}={value!r} is not supported: this release does not know the setting; leave it out")


@lru_cache(maxsize=1)
def _fields_and_defaults() -> tuple[dict[str, Any], dict[str, Any]]:
    return vars(GenerationConfig()), GenerationConfig._get_default_generation_params()


def refuse_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError for the first argument of `generate` that is not supported."""
    for name, instead in REFUSED_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported: {instead}")


def refuse_passed_on(arguments: dict[str, Any]) -> None:
    """Raises ValueError for the first keyword that transformers' `generate` passes on and that is not supported."""
    for name, value in arguments.items():
        if value is None or value is False or name in _PASSED_ON or name == "position_ids":
            continue
        # transformers itself adds an empty cache.
        if name in _CACHE and not getattr(value, "_is_user_defined", False):
            continue
        raise ValueError(f"{name} is not supported: {REFUSED_ARGUMENTS.get(name, 'leave it out')}")
