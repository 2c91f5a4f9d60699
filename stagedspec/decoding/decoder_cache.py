"""A cache of decoders: those made for a model object, and those made of a decoder and another draft."""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from transformers import GPT2LMHeadModel

from stagedspec.models.ngram import KatzTable

KEPT_DRAFTS = 4  # decoders kept for one owner


class _Entries(dict):
    """The decoders of one owner, the last used one last: key -> (setup, decoder, objects that must outlive the key)."""


_entries: "weakref.WeakKeyDictionary[Any, _Entries]" = weakref.WeakKeyDictionary()  # by the owner
_lock = threading.RLock()


class Releasable(Protocol):
    """A decoder, as this room sees it."""

    def release(self) -> None: ...


Cached = TypeVar("Cached", bound=Releasable)


def cached(owner: object, key: Hashable, setup: object, make: Callable[[], Cached], keep: object = None) -> Cached:
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


def draft_key(owner: object, draft: GPT2LMHeadModel | str, table: KatzTable | None) -> Hashable:
    """The key of an owner's decoder with this draft and n-gram table: the entry goes when a draft object does. The
    table must live as long as the entry (`cached`'s keep)."""
    with _lock:
        known = _entries.setdefault(owner, _Entries())
    name = draft if isinstance(draft, str) else _reference(draft, known)
    return name, None if table is None else id(table)
