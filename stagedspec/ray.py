"""Many prompts on many machines: an actor class for Ray Data's `map_batches`. Install the extra `ray`.

Ray places the actors, gives them work, and repeats what an actor had under way when it died; this class completes the
prompts that it is given. It imports nothing of Ray.
"""

from typing import Any

import numpy as np

from stagedspec.decoder import Decoder


class Complete:
    """Adds completions to batches of prompts: an actor has one decoder.

        dataset.map_batches(stagedspec.ray.Complete, fn_constructor_kwargs={"max_new_tokens": 128}, concurrency=2)

    target: as of `Decoder.from_pretrained`, None for the embedded models; decoder: further arguments of it (draft,
    dtype, ...). field: the column of prompts; text_field: that of completions; seed_field: a column with a seed for
    each row, which a sampled run needs, since no actor knows which rows are the others' (`row_seed` makes them).
    options: of `Decoder.complete_many`, such as max_new_tokens, batch and stop_strings.

    Raises ValueError for bad options and models when the actor starts.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        decoder: dict[str, Any] | None = None,
        field: str = "prompt",
        text_field: str = "text",
        seed_field: str | None = None,
        **options: Any,
    ):
        for name in ("seed", "num_samples", "ordered", "skip"):
            if name in options:
                instead = "a column of seeds, seed_field" if name == "seed" else "a row for each completion"
                raise ValueError(f"ray.Complete takes no {name}: give {instead}")
        self.field, self.text_field, self.seed_field, self.options = field, text_field, seed_field, options
        made = decoder or {}
        self.decoder = Decoder.default(**made) if target is None else Decoder.from_pretrained(target, **made)
        self.decoder.complete_many([], **options)  # refuses bad options now
        call = {name: value for name, value in options.items() if name not in ("batch", "window")}
        new_tokens = call.pop("max_new_tokens", None)
        # Options, their generation_config or the model's own may ask for it.
        if seed_field is None and self.decoder._trial(new_tokens, call, self.decoder.context).sampling.do_sample:
            raise ValueError(
                "sampling needs a seed for each row: give seed_field, the name of a column of seeds, or do_sample=False"
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of the batch with those of the completions: text_field, `finish_reason` and `error`, which is ""
        unless the prompt was skipped. Raises ValueError for a column that is missing."""
        for name in (self.field, self.seed_field):
            if name is not None and name not in batch:
                raise ValueError(f"there is no column {name!r} among {', '.join(map(repr, batch))}")
        seeds = None if self.seed_field is None else list(batch[self.seed_field])
        # numpy's texts are subclasses of Python's; anything else is for `complete_many` to skip.
        found = list(self.decoder.complete_many(list(batch[self.field]), seed=seeds, **self.options))
        columns = {
            self.text_field: [one.text for one in found],
            "finish_reason": [one.finish_reason for one in found],
            "error": [one.error or "" for one in found],
        }
        return batch | {name: np.array(values, dtype=object) for name, values in columns.items()}
