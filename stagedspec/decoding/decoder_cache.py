"""A cache of decoders: those made for a model object, and those made of a decoder and another draft."""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from transformers import GPT2LMHeadModel

from stagedspec.models.live_model import read_model
from stagedspec.models.loading import check_vocabularies, read_checkpoint
from stagedspec.models.ngram import KatzTable

if TYPE_CHECKING:
    from stagedspec.decoder import Decoder


KEPT_DRAFTS = 4  # decoders kept for one owner


class _Entries(dict):
    """The decoders of one owner, the last used one last: key -> (setup, decoder, objects that must outlive the key)."""


_entries: "weakref.WeakKeyDictionary[Decoder | GPT2LMHeadModel, _Entries]" = weakref.WeakKeyDictionary()  # by the owner
_lock = threading.RLock()


def cached(
    owner: "Decoder | GPT2LMHeadModel",
    key: Hashable,
    setup: object,
    make: Callable[[], "Decoder"],
    keep: object = None,
) -> "Decoder":
    """The decoder cached for an owner under a key; a new one, of `make`, if there is none or its setup differs.

    owner: a model object or a decoder; its entries go when it does. keep: what must live as long as the entry, as the
    object whose id is in the key.
    """
    with _lock:
        known = _entries.setdefault(owner, _Entries())
        found = known.pop(key, None)
        if found is None or found[0] != setup:
            if found is not None:
                found[1].release()
            found = setup, make(), keep
        known[key] = found
        while len(known) > KEPT_DRAFTS:
            del known[next(iter(known))]
        return found[1]


def _reference(draft: GPT2LMHeadModel, known: _Entries) -> weakref.ref:
    """A weak reference to use in a key: when the draft is freed, the entries with that key are dropped."""
    kept = weakref.ref(known)

    def gone(reference: weakref.ref) -> None:
        entries = kept()
        for key in list(entries or ()):
            if entries is not None and key[0] is reference:
                entries.pop(key, None)

    return weakref.ref(draft, gone)


def forget(model: GPT2LMHeadModel) -> None:
    """Drops the decoders cached for a model object: the next call reads its weights again.

    Needed only after single weights were written through `.data` or outside of torch, which can go unnoticed.
    """
    with _lock:
        _entries.pop(model, None)


def assisted(
    decoder: "Decoder", assistant: GPT2LMHeadModel | str, table: KatzTable | None = None, role: str = "assistant_model"
) -> "Decoder":
    """The decoder with another draft, made once for every pair and cached for as long as both live.

    assistant: a model object, or a checkpoint's folder or hub id. table: an n-gram table in place of the decoder's own.
    role: what messages call the draft.
    """

    def make() -> "Decoder":
        draft = read_checkpoint(assistant, role)
        target, held = decoder.target, draft is assistant
        check_vocabularies(target.vocab_size, draft.config.vocab_size, decoder.tokenizer)
        weights, live = read_model(
            draft, role, held, ops=target.ops, device=target.device, dtype=target.dtype, invariant=False,
            vocabulary=target.vocab_size,
        )  # fmt: skip
        return decoder.with_draft(weights, table, live)

    if not isinstance(assistant, (str, GPT2LMHeadModel)):
        read_checkpoint(assistant, role)  # for its message
    with _lock:
        known = _entries.setdefault(decoder, _Entries())
    name = assistant if isinstance(assistant, str) else _reference(assistant, known)
    return cached(decoder, (name, None if table is None else id(table)), None, make, table)
