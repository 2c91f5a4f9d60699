"""Follows the weights of a caller's model object, which may change after a decoder was made of it."""

import weakref
from threading import Lock
from typing import Any

from transformers import GPT2LMHeadModel

from stagedspec.models.gpt2 import GPT2
from stagedspec.models.loading import read_checkpoint
from stagedspec.models.plain_gpt2 import fingerprint


class LiveModel:
    """The current weights of a model object.

    Weights are copied, so that a generation never mixes old and new ones, even if the model changes meanwhile; but no
    other thread may write to the model while a call begins. The model is not kept alive: after it is freed, the last
    copy stays.

    model: has passed `read_checkpoint`. layout: the other arguments of `GPT2`. Changes through `.data` are looked for
    only in a target (`plain_gpt2.fingerprint`), because a draft cannot change the output.
    """

    def __init__(self, model: GPT2LMHeadModel, role: str, **layout: Any):
        self._model, self._role, self._layout = weakref.ref(model), role, layout
        self._sampled = layout.get("invariant", True)
        self._lock = Lock()
        self._seen = fingerprint(model, self._sampled)
        self.weights = GPT2(model, **layout)

    @property
    def model(self) -> GPT2LMHeadModel | None:
        """The model object, None after it was freed."""
        return self._model()

    def now(self) -> GPT2:
        """The weights, read again if the model has changed. Raises ValueError if it can no longer be decoded."""
        with self._lock:
            model = self._model()
            if model is not None and (seen := fingerprint(model, self._sampled)) != self._seen:
                read_checkpoint(model, self._role)
                self.weights = GPT2(model, **self._layout)
                self._seen = seen
            return self.weights


def read_model(model: GPT2LMHeadModel, role: str, held: bool, **layout: Any) -> tuple[GPT2, LiveModel | None]:
    """The weights of a model, and the `LiveModel` that follows it if the caller holds the model object.

    layout: the other arguments of `GPT2`.
    """
    if not held:
        return GPT2(model, **layout), None
    live = LiveModel(model, role, **layout)
    return live.weights, live
