"""The public `Decoder`: loads models, reads the arguments of calls, and decodes."""

import copy
import itertools
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from stagedspec.decoding import arguments, many
from stagedspec.decoding import warm_up as warmup
from stagedspec.decoding.callbacks import Callbacks, ended
from stagedspec.decoding.decoder_cache import cached, draft_key
from stagedspec.decoding.generation import Generation
from stagedspec.decoding.limits import MAX_BATCH, check_batch
from stagedspec.decoding.output import StagedOutput, finish
from stagedspec.decoding.pool import GenerationPool
from stagedspec.decoding.request import Call, CallContext, Request, StagedOptions, encode
from stagedspec.decoding.stats import ORIGINS, Stats, marks_wanted
from stagedspec.devices import resolve_device, resolve_dtype
from stagedspec.kernels.backends import select as kernel_backend
from stagedspec.models import embedded
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.live_model import LiveModel, read_model
from stagedspec.models.loading import (
    check_same_tokens,
    check_vocabularies,
    end_of_sequence,
    generation_defaults,
    load_tokenizer,
    padding,
    read_checkpoint,
    same_but_padding,
)
from stagedspec.models.model_set import Models
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.planner import TreePlanner
from stagedspec.planning.profile import Tuning
from stagedspec.planning.tree import TreeConfig
from stagedspec.values import at_least

log = logging.getLogger("stagedspec")


@dataclass(frozen=True)
class Completion:
    """A completed prompt: the new text, its tokens, who first proposed each of them, and what it cost.

    finish_reason: "length" where the limit ended it; "stop" where an end-of-sequence token, a stop string or another
    criterion did; "skipped" for a prompt that `complete_many` could not complete, for the reason in `error`.
    index, sample, seed: of `complete_many`: of the prompt, of its completion, and, sampled, the seed that repeats it.
    """

    text: str
    tokens: list[int]
    origins: list[str]
    stats: Stats
    finish_reason: str = "length"
    error: str | None = None
    index: int = 0
    sample: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Chunk:
    """What one step added to a stream. `text` can lag behind `tokens` by an incomplete UTF-8 character."""

    text: str
    tokens: list[int]
    origins: list[str]

    def __str__(self) -> str:
        return self.text


class Decoder:
    """Decodes a GPT-2 by staged speculative decoding (Spector & Ré, arXiv 2308.04623), losslessly.

    Make one with `from_pretrained` or `default`. Several threads may use it, in turn by steps. Between calls it keeps
    buffers, and with the Triton backend the memory and CUDA graphs of its last generations (`release` frees them);
    no result depends on them. `copy.deepcopy` gives a decoder with buffers of its own and the same weights; a pickle of
    one is refused.
    live: the caller's model objects behind target and draft, if there are any; each call reads their current weights.
    defaults: defaults for options that a call omits, from the model's own generation config. For a model object they
    follow changes of that config, as weights follow changes of the model.
    mark: marks the phases of a step for a profiler: by NVTX ranges if STAGEDSPEC_NVTX=1, else None.
    Steps that are marked are not captured as CUDA graphs, whose replays have no phases.
    """

    def __init__(
        self,
        target: GPT2,
        draft: GPT2 | None = None,
        ngram: KatzTable | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tree: TreeConfig | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        defaults: dict[str, Any] | None = None,
        live: tuple[LiveModel | None, LiveModel | None] = (None, None),
    ):
        if draft is not None and len(draft.token_table) != target.vocab_size:
            raise ValueError(
                f"a draft must be laid out for the target's vocabulary of {target.vocab_size} tokens, got one for "
                f"{len(draft.token_table)}: give GPT2 vocabulary={target.vocab_size}"
            )
        if ngram is not None:
            if not same_but_padding(ngram.vocab_size, target.vocab_size, tokenizer):
                raise ValueError(
                    f"the n-gram table was fitted for {ngram.vocab_size} tokens, the target has {target.vocab_size}; "
                    "fit one with this tokenizer, or give tokenizer=... if the rest are rows of padding"
                )
            ngram = ngram.resized(target.vocab_size).to(target.device)
        self.models, self.tokenizer = Models(target, draft, ngram), tokenizer
        self._live = live
        self._settings_seen = self._live_settings()
        self.eos_token_ids, self.pad_token_id = tuple(eos_token_ids), pad_token_id
        self.defaults = {} if defaults is None else defaults
        self.mark = marks_wanted()
        self.last_stats: Stats | None = None
        self.planner, self.pool = TreePlanner(self.models, tree), GenerationPool()
        self._following = Lock()

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path | GPT2LMHeadModel,
        draft: str | Path | GPT2LMHeadModel | None = None,
        ngram: str | Path | KatzTable | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        tree: TreeConfig | str | Path | None = "auto",
    ) -> "Decoder":
        """Loads target and draft: hub ids, folders written by `save_pretrained`, or GPT2LMHeadModel objects.

        ngram: a table made by `fit-ngram`; without one the context n-gram works alone. device "auto": the GPU if
        there is one. dtype "auto": bfloat16 on a GPU that has it, else float32. backend "auto": the Triton kernels on a
        GPU where they can run, else torch. tree: "auto" (or None) lets the cost model choose, on what was measured
        before on this machine or is measured at first use, and the trees adapt to the text; a file written by
        `stagedspec tune-tree` is used in its place; a TreeConfig is kept to.

        Weights are copied. A model object that changes later (an optimizer's step, `load_state_dict`, a hook) is
        checked and read again at the start of the next call, so that every call decodes with all of its weights as they
        were then: never with some old and some new ones. torch keeps no trace of what is written through `.data`,
        outside of torch, or into parameters made in inference mode: that is noticed where it changes a whole parameter,
        row or column (one row, one column and the diagonal of every matrix are compared). A change that goes
        unnoticed leaves the old weights in use: make a new decoder. `hf.custom_generate` does the same.
        A vocabulary of draft or table may differ from the target's by rows of padding or a few added tokens: ids that
        the draft does not have are never proposed.

        Raises ValueError for whatever is missing, damaged or does not fit together, and for a model object that is no
        plain GPT-2 in eval mode: hooks, adapters, replaced modules or methods, quantised, offloaded or non-finite
        weights.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        kernel_backend.resolve(backend, device, dtype=dtype)  # one that cannot run is refused before anything is loaded
        if tree is not None and not isinstance(tree, (TreeConfig, str, Path)):
            raise ValueError(f"tree must be a TreeConfig, 'auto' or a tuning's file, got {type(tree).__name__}")
        tuning = None
        if isinstance(tree, (str, Path)):
            tuning, tree = None if tree == "auto" else Tuning.load(tree), None
        target_model = read_checkpoint(target, "target")
        draft_model = None if draft is None else read_checkpoint(draft, "draft")
        configs = [model.config for model in (target_model, draft_model) if model is not None]
        head_sizes = {config.n_embd // config.n_head for config in configs}
        ops = kernel_backend.resolve(backend, device, head_sizes, dtype)
        loaded = load_tokenizer(tokenizer if tokenizer is not None else target)
        if draft_model is not None:
            sizes = [target_model.config.vocab_size, draft_model.config.vocab_size]
            check_vocabularies(sizes[0], sizes[1], loaded)
            if isinstance(draft, (str, Path)):
                check_same_tokens(loaded, load_tokenizer(draft), min(sizes))
        table = KatzTable.load(ngram) if isinstance(ngram, (str, Path)) else ngram
        if table is not None and not isinstance(table, KatzTable):
            raise ValueError(f"ngram must be a path or a KatzTable, got {type(ngram).__name__}")
        layout = {"ops": ops, "device": device, "dtype": dtype}
        weights, live = read_model(target_model, "target", target is target_model, **layout)
        draft_weights, draft_live = None, None
        if draft_model is not None:
            layout |= {"invariant": False, "vocabulary": weights.vocab_size}
            draft_weights, draft_live = read_model(draft_model, "draft", draft is draft_model, **layout)
        decoder = cls(
            weights,
            draft_weights,
            table,
            loaded,
            tree,
            end_of_sequence(target_model),
            padding(target_model),
            generation_defaults(target_model),
            (live, draft_live),
        )
        if tuning is not None:
            decoder.planner.use(tuning, "the tree file")
        return decoder

    @classmethod
    def default(cls, **options: Any) -> "Decoder":
        """The embedded target, draft and n-gram table, trained on Python source. Options as in `from_pretrained`."""
        embedded.check_installed("train some with `stagedspec train`")
        return cls.from_pretrained(embedded.TARGET, **{"draft": embedded.DRAFT, "ngram": embedded.NGRAM, **options})

    @property
    def target(self) -> GPT2:
        """The model that decides every token."""
        return self.models.target

    @property
    def draft(self) -> GPT2 | None:
        """The small model that proposes token trees, if there is one."""
        return self.models.draft

    @property
    def ngram(self) -> KatzTable | None:
        """The table that guesses ahead of the draft, if there is one."""
        return self.models.ngram

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.models.device

    @property
    def backend(self) -> str:
        """What runs their operations: "torch" or "triton"."""
        return self.models.backend

    def __repr__(self) -> str:
        parts = [f"target {self.target.parameters / 1e6:.1f}M"]
        if self.draft is not None:
            parts.append(f"draft {self.draft.parameters / 1e6:.1f}M")
        if self.ngram is not None:
            parts.append("n-gram table")
        dtype = str(self.target.dtype).removeprefix("torch.")
        return f"Decoder({', '.join(parts)}; {dtype} on {self.device}, backend {self.backend})"

    def use(self, tuning: Tuning) -> None:
        """Chooses trees by what `tuning.trees.tune` found. Raises ValueError if that was for other models."""
        self.planner.use(tuning, "the tuning")

    def with_draft(self, draft: GPT2, ngram: KatzTable | None = None, live: LiveModel | None = None) -> "Decoder":
        """This decoder with another draft; it shares the target. ngram: in place of this decoder's table."""
        return Decoder(
            self.target, draft, self.ngram if ngram is None else ngram, self.tokenizer, self.planner.fixed,
            self.eos_token_ids, self.pad_token_id, self.defaults, (self._live[0], live),
        )  # fmt: skip

    def assisted(
        self, assistant: GPT2LMHeadModel | str, table: KatzTable | None = None, role: str = "assistant_model"
    ) -> "Decoder":
        """This decoder with another draft, made once for every pair and cached for as long as both live.

        assistant: a model object, or a checkpoint's folder or hub id. table: an n-gram table in place of this
        decoder's. role: what messages call the draft.
        """

        def make() -> "Decoder":
            draft = read_checkpoint(assistant, role)
            target, held = self.target, draft is assistant
            check_vocabularies(target.vocab_size, draft.config.vocab_size, self.tokenizer)
            weights, live = read_model(
                draft, role, held, ops=target.ops, device=target.device, dtype=target.dtype, invariant=False,
                vocabulary=target.vocab_size,
            )  # fmt: skip
            return self.with_draft(weights, table, live)

        if not isinstance(assistant, (str, GPT2LMHeadModel)):
            read_checkpoint(assistant, role)  # for its message
        return cached(self, draft_key(self, assistant, table), None, make, table)

    def __deepcopy__(self, memo: dict) -> "Decoder":
        """Weights are never written to, so the copy shares them; it has its own buffers."""
        made = Decoder(
            self.target, self.draft, self.ngram, self.tokenizer, None, self.eos_token_ids, self.pad_token_id,
            copy.deepcopy(self.defaults, memo), self._live,
        )  # fmt: skip
        made.planner = self.planner.copy()
        made._settings_seen = self._settings_seen
        return made

    __copy__ = partialmethod(__deepcopy__, {})

    def __reduce_ex__(self, protocol: object) -> NoReturn:  # type: ignore[override]
        raise ValueError("a Decoder cannot be pickled: make one in every process, by Decoder.from_pretrained(...)")

    @property
    def live_target(self) -> "GPT2LMHeadModel | None":
        """The caller's model object that the target was made of, if it was and is still there."""
        return None if self._live[0] is None else self._live[0].model

    def follow(self) -> None:
        """Reads model objects of the caller's again if they have changed; every call begins with it.

        Raises ValueError if they can no longer be decoded.
        """
        with self._following:  # else a call that is slow could put back weights older than another's
            live_target, live_draft = self._live
            target = self.target if live_target is None else live_target.now()
            draft = self.draft if live_draft is None else live_draft.now()
            self._follow_settings()
            if target is self.target and draft is self.draft:
                return
            if target.vocab_size != self.target.vocab_size:
                raise ValueError(
                    f"the target's vocabulary has changed from {self.target.vocab_size} to {target.vocab_size} tokens: "
                    "make a new decoder"
                )
            self.models = Models(target, draft, self.ngram)
            self.planner.follow(self.models)
        self.release()

    def _live_settings(self) -> tuple | None:
        """Special tokens and defaults of the live target's generation config as it is now."""
        model = self.live_target
        return None if model is None else (tuple(end_of_sequence(model)), padding(model), generation_defaults(model))

    def _follow_settings(self) -> None:
        """Takes over special tokens and defaults that have changed."""
        now = self._live_settings()
        if now is not None and now != self._settings_seen:
            self.eos_token_ids, self.pad_token_id, self.defaults = self._settings_seen = now

    # ------------------------------------------------------------ the three ways to decode

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        mode: str = "staged",
        *,
        seed: int | Sequence[int] | torch.Tensor | None = None,
        tree: TreeConfig | None = None,
        **options: Any,
    ) -> torch.Tensor | StagedOutput:
        """Continues input_ids, LongTensor [B, prompt], and returns LongTensor [B, prompt + new].

        Prompts of different lengths are padded on the left and marked in attention_mask [B, prompt], as
        transformers does; rows that stop early are filled up with pad_token_id (None: with the first eos id).
        options: whatever transformers' `generate` takes, with its meanings: do_sample, temperature, top_k, top_p,
        min_p, eos_token_id (None or an empty list never stops), pad_token_id, max_length, generation_config,
        logits_processor, stopping_criteria, streamer, return_dict_in_generate (then a `hf.StagedOutput`, with
        `stats`), output_scores, repetition_penalty and the rest; assistant_model is a draft for this call, and
        prompt_lookup_num_tokens proposes by the context n-gram where there is no draft (one takes precedence, with a
        warning).
        `stagedspec.decoding.settings` lists what is honoured and what is refused. An option left out is the
        generation_config's, else the model's own, else 128 new tokens, greedy, nothing warped (with a
        generation_config: transformers' defaults, such as top_k=50).

        seed: of the sampled tokens, an integer of 64 bits or one a row (then a row can be reproduced alone). None draws
        it from torch's generator of the CPU: two calls differ, and `torch.manual_seed` repeats them. For a given seed
        every mode, draft and tree gives the same tokens; `last_stats` tells what they cost. Logits processors are
        applied at every accepted position: exact, and slower.

        Everything is computed in the decoder's own dtype and on its own device, whatever torch's default dtype and
        default device are; an autocast around the call has no effect, and a warning says so.

        Raises ValueError for bad input and for what is not supported, before any work; RuntimeError where no token can
        be chosen, as its logits, after processors, are NaN, all -inf or, when sampling, +inf.
        """
        decoder = self
        with ended(options.get("streamer")):
            if options.get("assistant_model") is not None:
                decoder = self.assisted(options.pop("assistant_model"))
            staged = StagedOptions(mode, seed, tree)
            output = decoder.decode(decoder._read(input_ids, attention_mask, max_new_tokens, staged, options))
        self.last_stats = decoder.last_stats
        return output

    def decode(self, call: Call) -> torch.Tensor | StagedOutput:
        """Decodes a call whose arguments have been read: the second part of `generate`."""
        run = self._start(call.request, call.callbacks, call.began)
        for _ in run.steps():
            if call.callbacks is not None:
                call.callbacks.notify(run.sequences, run.prompt_lengths)
        stats = self.last_stats = run.stats()  # another thread may set last_stats at any time
        new = run.new_tokens(call.pad)
        self._keep(run, stats)
        sequences = torch.cat((call.input_ids, new.to(call.input_ids.device)), 1)
        return finish(call, sequences, stats)

    def complete(self, prompt: str | torch.Tensor, max_new_tokens: int | None = None, **options: Any) -> Completion:
        """Completes one prompt, text or LongTensor [T] or [1, T]; options as in `generate`, but 64 new tokens."""
        call = self._read_one(prompt, max_new_tokens, options)
        run = self._start(call.request, call.callbacks, call.began)
        for _ in run.steps():
            if call.callbacks is not None:
                call.callbacks.notify(run.sequences, run.prompt_lengths)
        stats = self.last_stats = run.stats()
        one = many.Waiting(many.Prompt(prompt), call)
        completion = self._completion(many.Ended.of(one, run.sequences.rows[0], stats))
        self._keep(run, stats)
        return completion

    def complete_many(
        self,
        prompts: Iterable[str | torch.Tensor],
        max_new_tokens: int | None = None,
        *,
        num_samples: int = 1,
        seed: int | Sequence[int] | torch.Tensor | None = None,
        batch: int = MAX_BATCH,
        ordered: bool = True,
        window: int = 512,
        skip: Container[tuple[int, int]] = (),
        **options: Any,
    ) -> Iterator[Completion]:
        """Completes prompts, texts or LongTensors [T], in batches, and yields a `Completion` for each sample of each.

        Its tokens are those of `complete(prompt, seed=completion.seed, ...)`, whatever is decoded beside it. Options as
        in `complete`; a stopping criterion sees one row at a time, and with logits processors prompts are decoded one
        by one. A prompt that is empty, too long or no text, or after which no token can be chosen, is skipped: the
        logger `stagedspec` names it, and so does its completion, with the finish_reason "skipped".

        num_samples: completions of each prompt. seed: of a sampled run, which gives each row the seed
        `row_seed(seed, index, sample)`; or one a prompt, used as they are; None draws one, as in `generate`. batch:
        rows decoded together, at most 16, in the mode 'autoregressive' 64. ordered: whether completions come in the
        order of the prompts, or as they end. window: so many rows are read ahead and sorted by length. skip: pairs
        (index, sample) that are left out, such as those of an earlier run.

        Where the backend can (torch), the next prompt takes the place of a row that has ended; else (triton) a batch
        ends as a whole. All is decoded with the weights at the time of the call. `last_stats` is left as it is.

        Raises ValueError for bad options, before any work.
        """
        if isinstance(prompts, (str, torch.Tensor)) or not isinstance(prompts, Iterable):
            raise ValueError(
                f"prompts must be several texts or LongTensors of token ids, got {type(prompts).__name__}: "
                "give a list, or use complete for one"
            )
        num_samples, window = at_least("num_samples", num_samples), at_least("window", window)
        batch = at_least("batch", batch)
        if options.get("max_time") is not None:
            raise ValueError("complete_many takes no max_time: a prompt's time would pass while others are decoded")
        self.follow()
        context = self.context
        options = arguments.with_shared_criteria(context, options)
        trial = self._trial(max_new_tokens, options, context)
        check_batch(batch, trial.mode)
        seed_of = many.seeds(seed, num_samples, trial.sampling.do_sample)

        def read(prompt: many.Prompt, batch: int) -> Call:
            return self._read_one(prompt.given, max_new_tokens, {**options, "seed": prompt.seed}, context, batch)

        each = (
            many.Prompt(prompt, index, sample, seed_of(index, sample))
            for index, prompt in enumerate(prompts)
            for sample in range(num_samples)
            if (index, sample) not in skip
        )
        return self._complete_many(each, read, context.models, batch, window, ordered)

    def _trial(self, max_new_tokens: int | None, options: dict[str, Any], context: CallContext) -> Request:
        """What `complete` would do with these options. Raises ValueError for bad ones.

        A prompt of one token shows whether they are good: what is refused later is a prompt. With a tree that is given
        nothing is measured.
        """
        tree = options.get("tree") or self.planner.fixed or TreeConfig()
        one = torch.zeros(1, dtype=torch.long, device="cpu")
        return self._read_one(one, max_new_tokens, {**options, "seed": 0, "tree": tree}, context).request

    def _complete_many(
        self,
        prompts: Iterator[many.Prompt],
        read: Callable[[many.Prompt, int], Call],
        models: Models,
        batch: int,
        window: int,
        ordered: bool,
    ) -> Iterator[Completion]:
        done: dict[int, Completion] = {}  # not yielded yet, by number
        numbers, following = itertools.count(), 0
        refused = (-1, "")  # the last prompt that could not be read, and why: its samples follow one another
        named: set[int] = set()  # prompts whose skipping was logged

        def skipped(prompt: many.Prompt, error: str) -> Completion:
            if prompt.index not in named:
                named.add(prompt.index)
                log.warning("prompt %s is skipped: %s", prompt.index, error)
            return Completion("", [], [], Stats(""), "skipped", error, *prompt.names)

        def windows() -> Iterator[list[many.Waiting]]:
            nonlocal refused
            while part := list(itertools.islice(prompts, window)):
                together, waiting = batch if len(part) > 1 else 1, []
                for prompt, number in zip(part, numbers, strict=False):
                    if prompt.index != refused[0]:
                        try:
                            waiting.append(many.Waiting(prompt, read(prompt, together), number))
                            continue
                        except ValueError as error:
                            refused = prompt.index, str(error)
                    done[number] = skipped(prompt, refused[1])
                yield waiting

        def again(one: many.Waiting) -> many.Waiting:
            return one._replace(call=read(one.prompt, batch))

        def start(request: Request, callbacks: Callbacks | None) -> Generation:
            return self._start(request, callbacks, models=models)

        replaces = models.target.ops.replaces_rows
        ended = many.decode(windows(), batch, replaces, start, partial(self._keep, stats=None), again)
        for one in itertools.chain(ended, [None]):  # at the end, those that were skipped last
            if one is not None:
                done[one.number] = self._completion(one) if one.error is None else skipped(one.prompt, one.error)
            while done and (not ordered or following in done):
                yield done.pop(following if ordered else next(iter(done)))
                following += 1

    def _completion(self, ended: many.Ended) -> Completion:
        return Completion(
            self._decode(ended.tokens),
            ended.tokens,
            [ORIGINS[origin] for origin in ended.origins],
            ended.stats,
            "stop" if ended.stopped else "length",
            None,
            *ended.prompt.names,
        )

    def stream(self, prompt: str | torch.Tensor, max_new_tokens: int | None = None, **options: Any) -> Iterator[Chunk]:
        """Completes one prompt and yields what each step adds; options as in `generate`, but 64 new tokens.

        Closing the iterator, or Ctrl-C, ends it cleanly.
        """
        return self._stream(self._read_one(prompt, max_new_tokens, options))

    def _stream(self, call: Call) -> Iterator[Chunk]:
        run = self._start(call.request, call.callbacks, call.began)
        start, shown, text = len(call.request.prompts[0]), 0, ""
        whole = False  # whether all steps that began have ended
        try:
            for _ in run.steps():
                if call.callbacks is not None:
                    call.callbacks.notify(run.sequences, run.prompt_lengths)
                row = run.sequences.rows[0]  # a snapshot, where the state lives on a device
                # A character cut in the middle of its bytes decodes to U+FFFD: wait for the rest.
                ready = self._decode(row.tokens[start:])
                ready = ready.rstrip("\ufffd") if row.running else ready
                if len(row.origins) == shown and ready == text:
                    continue  # with state on a device the host learns one step late that the row has stopped
                yield Chunk(
                    ready[len(text) :],
                    row.tokens[start + shown :],
                    [ORIGINS[origin] for origin in row.origins[shown:]],
                )
                shown, text = len(row.origins), ready
            whole = True
        except GeneratorExit:  # closed between two steps
            whole = True
            raise
        finally:
            stats = self.last_stats = run.stats()  # before another call may use the generation
            if whole:
                self._keep(run, stats)

    # ------------------------------------------------------------ generations

    def _start(
        self,
        request: Request,
        callbacks: Callbacks | None = None,
        began: float | None = None,
        models: Models | None = None,
    ) -> Generation:
        """models: of the time when the request was read; None for the current ones."""
        controller = self.planner.controller(
            request.mode, len(request.prompts), request.sampling.do_sample, request.levels
        )
        return self.pool.take(models or self.models, request, callbacks, self.mark, controller, began)

    def _keep(self, run: Generation, stats: Stats | None) -> None:
        """Returns a generation that has ended to the pool; its results must have been read before."""
        if stats is not None and len(run.request.prompts) == 1:
            self.planner.reconsider(run.request.sampling.do_sample, stats.steps, stats.seconds.get("target"))
        self.pool.give(run, self.models)

    def warm_up(
        self,
        modes: Sequence[str] | None = None,
        samplings: Sequence[dict[str, Any]] = (warmup.GREEDY, warmup.SAMPLED),
        batch: int | Sequence[int] = 1,
        tokens: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> int:
        """Compiles kernels, in parallel, measures the pass times that choose trees, and captures CUDA graphs, ahead of
        the first generation. Returns how many kernels were not loaded before.

        Without it the first generation with each mode, sampling and batch size does the same for itself. What is
        compiled and measured is kept on disk for later processes. CUDA graphs live as long as the decoder keeps the
        generation: those of the last eight such combinations, with at most 2 GiB of keys and values, or a sixteenth of
        the GPU's memory if that is more.

        modes: None for all that this decoder has. samplings: options of `generate` that choose tokens, one dict each
        (do_sample, temperature, top_k, top_p, min_p); by default greedy and top-k 50. batch: one batch size or several.
        tokens: the most prompt and new tokens of one sequence, None for n_positions. progress: called with (what is
        being made ready, kernels that are ready, all of its kernels); without it compiling that takes long is logged.
        Prompt lookup and logits processors are not covered.

        Raises ValueError for an unknown mode or option, without the Triton backend, and where GPU memory is too small.
        Interrupted, it leaves what was compiled.
        """
        self.follow()
        return warmup.warm_up(self.context, self.pool, self.mark, modes, samplings, batch, tokens, progress)

    def release(self) -> None:
        """Frees the memory and the CUDA graphs that are kept of generations that have ended, and the backend's buffers.
        A generation that is under way keeps its own."""
        self.pool.release(self.models)

    # ------------------------------------------------------------ requests

    @property
    def context(self) -> CallContext:
        """What calls are read with, as it is now."""
        return CallContext(
            self.models, self.planner, self.tokenizer, self.eos_token_ids, self.pad_token_id, self.defaults,
            self.live_target,
        )  # fmt: skip

    def _read(
        self, input_ids: Any, attention_mask: Any, max_new_tokens: Any, staged: StagedOptions, options: dict,
        context: CallContext | None = None,
    ) -> Call:  # fmt: skip
        """The arguments of `generate`, read and checked. context: None for the current one."""
        began = time.perf_counter()
        if context is None:
            self.follow()
            context = self.context
        return arguments.read(context, input_ids, attention_mask, max_new_tokens, staged, options, began)

    def _read_one(
        self, prompt: str | torch.Tensor, max_new_tokens: int | None, options: dict[str, Any],
        context: CallContext | None = None, batch: int | None = None,
    ) -> Call:  # fmt: skip
        """The arguments of `complete`, read and checked. batch: of `StagedOptions`."""
        input_ids = encode(prompt, self.tokenizer)
        if len(input_ids) != 1:
            raise ValueError(f"stream and complete take one prompt, got a batch of {len(input_ids)}; use generate")
        options = dict(options)
        for name in ("streamer", "return_dict_in_generate", "assistant_model"):
            if options.get(name):
                raise ValueError(f"stream and complete take no {name}: use generate")
        lengths = {"generation_config", "max_new_tokens", "max_length"}
        if max_new_tokens is None and not lengths & (options.keys() | self.defaults.keys()):
            max_new_tokens = 64
        mode, seed, tree = options.pop("mode", "staged"), options.pop("seed", None), options.pop("tree", None)
        staged = StagedOptions(mode, seed, tree, batch)
        return self._read(input_ids, None, max_new_tokens, staged, options, context)

    def tree_for(
        self, mode: str, batch: int = 1, tree: TreeConfig | None = None, do_sample: bool = False
    ) -> TreeConfig:
        """The tree settings a call would use: the call's, else the decoder's, else the cost model's."""
        return self.planner.tree_for(mode, batch, tree, do_sample)

    def _decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
