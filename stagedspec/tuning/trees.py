"""`stagedspec tune-tree`: measures a pair of models on this machine and finds the fastest token trees for it.

Acceptance is measured on the target's own text: at every position the draft ranks its children under the noise of that
position, and draft² guesses the first of them. From this an acceptance profile is fitted: kinds of text, easy to hard.
With it the cost model proposes a few trees of each mode, and the one that decodes fastest is kept.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, cast

import torch
import torch.nn.functional as F

from stagedspec.decoder import Decoder
from stagedspec.decoding.stats import Stats
from stagedspec.devices import current_device
from stagedspec.kernels.reference import NoiseAt, choose_children, gumbel_noise
from stagedspec.kernels.state.host import CHUNK, ngram_guesses
from stagedspec.models.gpt2 import GPT2, Cache
from stagedspec.planning.cost import CHILDREN, SAMPLED, AcceptanceProfile, Model, PassTimes
from stagedspec.planning.profile import Tuning, pair_of
from stagedspec.planning.tree import MODES, TreeConfig
from stagedspec.tuning.compare import Run, compare, measure
from stagedspec.values import at_least

KINDS, WINDOW = 3, 8  # kinds of text in a profile, and consecutive tokens taken to be of one kind
FINALISTS, HEATS = 4, 8  # trees of a mode that are timed, and on how many groups of prompts
# Where every tree has kernels of its own, which take seconds to compile: trees of a mode, and seconds for all.
COMPILED_FINALISTS, COMPILED_SECONDS = 2, 75.0

# The rank of the token written among the draft's children, -1 for none; whether draft² named the draft's first child.
Outcome = tuple[int, bool]
Group = tuple[torch.Tensor, torch.Tensor]  # prompts of one batch: ids and attention mask, [B, L]


def outcomes(decoder: Decoder, prompt: Sequence[int], new_tokens: int, sampled: bool, seed: int = 0) -> list[Outcome]:
    """How well the draft and draft² guess each token that the target writes after a prompt.

    Raises ValueError without a draft.
    """
    draft, table, device = decoder.draft, decoder.ngram, decoder.device
    if draft is None:
        raise ValueError("expected a decoder with a draft")
    options: dict[str, Any] = {"do_sample": True, **SAMPLED} if sampled else {}
    ids = torch.tensor([list(prompt)])
    row = decoder.generate(
        ids, max_new_tokens=new_tokens, mode="autoregressive", eos_token_id=[], seed=seed, **options
    )[0].to(device)  # fmt: skip
    start, count = len(prompt) - 1, len(row) - 1
    with torch.inference_mode(), draft.ops.lock, current_device(device):
        logits = _logits(draft, row[:-1], start)
        positions = torch.arange(count, device=device)[None]
        noise = None
        if sampled:
            counters = torch.tensor([seed], device=device), torch.tensor([0], device=device)
            values = gumbel_noise(*counters, positions[:, start:] + 1, draft.vocab_size)
            noise = NoiseAt(values, torch.arange(count - start, device=device)[None])
        children, _ = choose_children(logits, min(CHILDREN, draft.vocab_size), SAMPLED if sampled else None, noise)
    tokens, ranked = row.tolist(), children[0].tolist()
    follower = dict(zip(pairwise(tokens[: start + 1]), tokens[2 : start + 1], strict=False))
    found = []
    for index, names in enumerate(ranked):
        first, last = tokens[start + index - 1] if start + index else -1, tokens[start + index]
        scored = ngram_guesses(follower, table, first, last)
        if noise is not None:
            scored = [(token, score + noise.values[0, index, token].item()) for token, score in scored]
        named = bool(scored) and max(scored, key=lambda pair: pair[1])[0] == names[0]
        token = tokens[start + index + 1]
        found.append((names.index(token) if token in names else -1, named))
        follower[first, last] = token
    return found


def _logits(model: GPT2, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [1, T - start, V] of the positions of tokens [T] from `start` on."""
    cache = Cache(model, 1, 1, model.positions)  # one tree row: some backends want one
    first, found = cache.tree_rows, []
    # Filled up to whole chunks, so that there are few sizes of passes to compile.
    filled = F.pad(tokens, (0, min(-len(tokens) % CHUNK, model.positions - len(tokens))))[None]
    for at in range(0, len(tokens), CHUNK):
        batch = model.ops.prefill_batch(filled[:, at : at + CHUNK], at, model.kv_dtype)
        hidden = model.forward(batch, cache, first + at, first)[:, max(0, start - at) : len(tokens) - at]
        if hidden.shape[1]:
            found.append(model.logits(hidden.contiguous()).clone())  # its buffer is used again
    return torch.cat(found, 1)


def fit_profile(texts: Sequence[Sequence[Outcome]]) -> tuple[AcceptanceProfile, ...]:
    """Fits an acceptance profile to texts, easiest kind first: a mixture of multinomials over windows, by EM.

    Deterministic. Raises ValueError without any outcome.
    """
    windows = [text[start : start + WINDOW] for text in texts for start in range(0, len(text), WINDOW)]
    if not windows:
        raise ValueError("expected at least one token to fit to, got none")
    counts = torch.zeros(len(windows), CHILDREN + 1, dtype=torch.float64)  # the last column: none of the children
    named = torch.zeros(len(windows), 2, dtype=torch.float64)
    for index, window in enumerate(windows):
        for rank, guess in window:
            counts[index, rank] += 1
            named[index, int(guess)] += 1
    sizes = counts.sum(1)
    # Start: thirds of the windows by how often the first child came true.
    order = (counts[:, 0] / sizes).argsort(descending=True, stable=True)
    member = torch.zeros(len(windows), KINDS, dtype=torch.float64)
    for kind, part in enumerate(order.tensor_split(KINDS)):
        member[part, kind] = 1
    for _ in range(100):
        ranks = member.T @ counts + 0.02  # a small pseudo-count, so that no logarithm is infinite
        ranks /= ranks.sum(1, keepdim=True)
        guesses = member.T @ named + 0.02
        guesses /= guesses.sum(1, keepdim=True)
        share = (member.sum(0) + 1e-9) / len(windows)
        member = (counts @ ranks.log().T + named @ guesses.log().T + share.log()).softmax(1)
    share = (member * sizes[:, None]).sum(0) / sizes.sum()
    kinds = [
        (round(share[kind].item(), 4), tuple(round(rate, 4) for rate in ranks[kind, :-1].tolist()),
         round(guesses[kind, 1].item(), 4))
        for kind in range(KINDS) if share[kind] > 0.005
    ]  # fmt: skip
    return tuple(sorted(kinds, key=lambda kind: -kind[1][0]))


def tune(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 96,
    batches: Sequence[int] = (1,),
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float | None = None,
) -> Tuning:
    """Measures pass times and acceptance, times the most promising trees of each drafting mode, greedy and sampled, and
    keeps the fastest; then times the modes with these trees.

    prompts: token ids. From then on the decoder uses the result. progress: called with (done, total). seconds: when
    they are over, the cost model's best tree is taken without timing others; None: as long as it takes where trees have
    no kernels of their own, else COMPILED_SECONDS.

    Raises ValueError without a draft or prompts, or for prompts that leave no room for new_tokens.
    """
    began, ops = time.perf_counter(), decoder.target.ops
    new_tokens, batches = at_least("new_tokens", new_tokens), [at_least("batches", batch) for batch in batches]
    if seconds is None:
        seconds = COMPILED_SECONDS if ops.compiles_kernels else math.inf
    if decoder.draft is None:
        raise ValueError("trees are tuned for a target and its draft, and there is no draft: give a draft (--draft)")
    room = decoder.target.positions - new_tokens
    if room < 1:
        raise ValueError(
            f"new_tokens must leave room for a prompt, so at most {decoder.target.positions - 1}, got {new_tokens}"
        )
    lengths = [len(prompt) for prompt in prompts]
    prompts = [list(prompt) for prompt in prompts if 0 < len(prompt) <= room]
    if not prompts:
        raise ValueError(
            f"expected at least one prompt of 1 to {room} tokens, got {len(lengths)} of {min(lengths, default=0)} to "
            f"{max(lengths, default=0)}; lower new_tokens, or give shorter ones"
        )
    modes = [mode for mode in MODES if mode != "autoregressive"]
    total, done = 2 * len(prompts) + 2 * len(batches) * (1 + len(modes) + len(MODES)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    tuning, times = Tuning(pair_of(decoder.models)), PassTimes(decoder.target, decoder.draft)
    for sampled in (False, True):
        texts = []
        for seed, prompt in enumerate(prompts):
            texts.append(outcomes(decoder, prompt, new_tokens, sampled, seed))
            advance()
        tuning.profiles[sampled] = fit_profile(texts)
    tuning.seconds = times.seconds
    most = COMPILED_FINALISTS if ops.compiles_kernels else FINALISTS
    for batch, sampled in product(batches, (False, True)):
        model = Model(times, batch, sampled, tuning.profiles[sampled], ops)
        with ops.lock, current_device(decoder.device):
            times.prepare(batch, sampled)
            ranked = {mode: model.finalists(mode, most) for mode in modes}  # measures passes
            times.release()
        groups = _groups(prompts, batch)
        for mode, finalists in ranked.items():
            if time.perf_counter() - began > seconds:
                finalists = finalists[:1]
            tuning.trees[mode, batch, sampled] = _fastest(
                decoder, tuning, model, mode, finalists, groups[:HEATS], new_tokens
            )
            advance()
        decoder.use(tuning)
        tuning.measured += _timed(decoder, tuning, model, groups, new_tokens, advance)
    return tuning


def _groups(prompts: Sequence[Sequence[int]], batch: int) -> list[Group]:
    """The prompts in batches. The last batch is filled up with the first prompts."""
    groups = []
    for start in range(0, len(prompts), batch):
        rows = [prompts[(start + index) % len(prompts)] for index in range(batch)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        groups.append((ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])))
    return groups


class _Side:
    """Generations in one mode, and their tokens per second over all rows, without prefill."""

    def __init__(self, decoder: Decoder, model: Model, mode: str, new_tokens: int):
        self.decoder = decoder
        self.options: dict[str, Any] = {"max_new_tokens": new_tokens, "mode": mode, "eos_token_id": []}
        self.options |= {"do_sample": model.sampled, "seed": 0}  # one seed, so that all sides write the same
        self.options |= SAMPLED if model.sampled else {}
        self.reset()

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def __call__(self, group: Group) -> Run:
        output = self.decoder.generate(*group, **self.options)
        stats = cast(Stats, self.decoder.last_stats)  # a generation has just ended
        self.tokens += stats.new_tokens
        self.seconds += stats.total_seconds - stats.seconds.get("prefill", 0.0)
        return Run(output[:, group[0].shape[1] :].flatten().tolist(), stats.as_dict())

    def reset(self) -> None:
        """Forgets the runs so far, after a warm-up."""
        self.tokens, self.seconds = 0, 0.0


def _fastest(
    decoder: Decoder,
    tuning: Tuning,
    model: Model,
    mode: str,
    finalists: Sequence[TreeConfig],
    groups: Sequence[Group],
    new_tokens: int,
) -> list[TreeConfig]:
    """The trees, smallest first, of the finalist with the most tokens per second. Finalists are timed in turn."""
    all_levels = [model.levels(mode, tree) for tree in finalists]
    if len(all_levels) == 1:
        return all_levels[0]
    sides = [_Side(decoder, model, mode, new_tokens) for _ in all_levels]

    def with_trees(index: int) -> Callable[[Group], Run]:
        trees = tuning.trees | {(mode, model.batch, model.sampled): all_levels[index]}

        def run(group: Group) -> Run:
            decoder.use(replace(tuning, trees=trees))
            decoder.tree_for(mode, model.batch, do_sample=model.sampled)  # outside what is timed
            return sides[index](group)

        return run

    runs = {str(index): with_trees(index) for index in range(len(all_levels))}
    for index, run in enumerate(runs.values()):
        for group in groups[:2]:  # the first may leave a graph to capture
            run(group)
        sides[index].reset()
    measure(runs, groups)
    return all_levels[max(range(len(all_levels)), key=lambda index: sides[index].rate)]


def _timed(
    decoder: Decoder,
    tuning: Tuning,
    model: Model,
    groups: Sequence[Group],
    new_tokens: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Predicted and measured tokens per second of each mode. Modes are timed in turn."""
    batch, sampled = model.batch, model.sampled
    sides = {mode: _Side(decoder, model, mode, new_tokens) for mode in MODES}
    for side in sides.values():
        side(groups[0])
        side.reset()
        advance()
    found = []
    plain = batch / model.verify_seconds(1)
    for row in compare(sides, groups):
        tree = None if row.name == "autoregressive" else tuning.trees[row.name, batch, sampled][-1]
        predicted = plain if tree is None else batch * model.tokens_per_second(tree)
        found.append(
            {
                "mode": row.name,
                "batch": batch,
                "sampled": sampled,
                "predicted_tokens_per_second": predicted,
                "measured_tokens_per_second": sides[row.name].rate,
                "predicted_speedup": predicted / plain,
                "measured_speedup": row.speedup,
                "predicted_tokens_per_step": 1.0 if tree is None else model.step(tree)[0],
                "measured_tokens_per_step": row.tokens_per_step,
                "identical": row.identical,
            }
        )
    advance()
    return found
