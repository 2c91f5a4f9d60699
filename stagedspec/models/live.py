"""Model objects of the caller's, which may change after a decoder was made of them."""

import weakref
from threading import Lock
from typing import Any

from transformers import GPT2LMHeadModel

from stagedspec.models.gpt2 import GPT2
from stagedspec.models.loading import read_checkpoint
from stagedspec.models.plain import fingerprint


class LiveModel:
    """The weights of a model object as it is now.

    What is read is a copy, so that weights are never a mixture of old and new ones, not even in a generation during
    which the model changes; but another thread must not write to the model while a call begins. The model itself is not
    kept alive; once it is gone, the last copy stays.

    model: checked already, by `read_checkpoint`. layout: the other arguments of `GPT2`. Changes through `.data` are
    looked for in a target alone (`plain.fingerprint`): a draft cannot change the output.
    """

    def __init__(self, model: GPT2LMHeadModel, role: str, **layout: Any):
        self._model, self._role, self._layout = weakref.ref(model), role, layout
        self._sampled = layout.get("invariant", True)
        self._lock = Lock()
        self._seen = fingerprint(model, self._sampled)
        self.weights = GPT2(model, **layout)

    @property
    def model(self) -> GPT2LMHeadModel | None:
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
    """The weights of a model, laid out by the other arguments of `GPT2`; and the `LiveModel` that follows the model if
    the caller holds it."""
    if not held:
        return GPT2(model, **layout), None
    live = LiveModel(model, role, **layout)
    return live.weights, live
