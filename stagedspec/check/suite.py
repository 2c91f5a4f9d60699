"""All checks of the Triton backend on the GPU at hand, for `stagedspec check`, and the record of their result.

Three parts: every kernel against the reference at the models' shapes (kernels.py, trees.py); the target's logits from
passes of one token and of several (logits.py); and plain against chain, tree and staged decoding, token by token. If
all of it passes, `record` makes backend "auto" trust the kernels on this GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, cast

import torch

from stagedspec.check import kernels as check_kernels
from stagedspec.check import trees as check_trees
from stagedspec.check.kernels import Wrong, expect
from stagedspec.check.logits import check_tokens, compare_logits
from stagedspec.decoder import Decoder
from stagedspec.decoding.stats import Stats
from stagedspec.devices import current_device, memory_errors, out_of_memory
from stagedspec.kernels.common import trusted
from stagedspec.kernels.common.compiling import compile_ahead
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.tree import MODES, TreeConfig
from stagedspec.tuning.prompts import PROMPTS
from stagedspec.tuning.workloads import SAMPLINGS as WARPINGS
from stagedspec.tuning.workloads import katz_table, tree_config

TREE = tree_config(16)
NEW_TOKENS = 64
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 50": {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0},
}
SEED = 7


@dataclass(frozen=True)
class Case:
    """One thing to check. run: returns a remark on success; raises Wrong."""

    name: str
    shape: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Result:
    """Result of one check. remark: how close the result is to the reference, or what is wrong."""

    name: str
    shape: str
    passed: bool
    remark: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(
    decoder: Decoder,
    modes: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Result]:
    """Runs all checks on a decoder of the Triton backend.

    modes: decoding modes to compare with plain decoding; default: all that the decoder has. prompts: token ids;
    default: a few beginnings of Python files, or random tokens without a tokenizer. report: called before each check
    with its name, the number of checks done and the number of all.

    A kernel that does not compile or run has failed its check. Raises ValueError for an unknown mode, another backend,
    prompts that do not fit the model, and if memory runs out.
    """
    modes = check_modes(modes) if modes or decoder.draft is not None else []
    if not decoder.target.ops.compiles_kernels:
        raise ValueError(f"the kernels of backend 'triton' are checked, got a decoder of backend {decoder.backend!r}")
    for mode in modes:
        decoder.tree_for(mode, tree=TREE)
    prompts = _prompts(decoder) if prompts is None else [list(prompt) for prompt in prompts]
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or min(sizes) < 2 or max(sizes) >= decoder.target.positions:
        raise ValueError(
            f"prompts must have from 2 to {decoder.target.positions - 1} tokens, n_positions - 1, got {sizes}"
        )
    check_tokens(prompts, decoder.target.vocab_size)
    with memory_errors("the check"), current_device(decoder.device):
        table = katz_table(decoder.target.vocab_size, decoder.device) if decoder.ngram is None else decoder.ngram
        kernels = list(_kernel_cases(decoder.target, decoder.draft, table, TREE))
        work = [
            *kernels,
            _logits_case(decoder, prompts),
            *_decoding_cases(decoder, modes, prompts),
        ]
        report("compiling", 0, len(work))
        with suppress(Exception):  # the check of that kernel reports it
            compile_ahead([partial(_run, case) for case in kernels], decoder.device)
        results: list[Result] = []
        for case in work:
            report(case.name, len(results), len(work))
            results.append(_run(case))
            if results[-1].remark.startswith(BROKEN):  # every later launch would fail
                break
        decoder.release()
    return results


BROKEN = "the GPU reported an error"


def _run(case: Case) -> Result:
    try:
        return Result(case.name, case.shape, True, case.run())
    except Wrong as error:
        remark = str(error)
    except Exception as error:  # Triton, torch and launchers raise many kinds: the kernel does not run
        if out_of_memory(error):
            raise
        broken = isinstance(error, torch.AcceleratorError)
        remark = f"{BROKEN}: {_line(error)}" if broken else f"does not run: {_line(error)}"
    return Result(case.name, case.shape, False, remark)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def check_modes(modes: Sequence[str]) -> list[str]:
    """The modes to compare with plain decoding. Raises ValueError for one that does not exist."""
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return list(modes) or [mode for mode in MODES if mode != "autoregressive"]


# ---------------------------------------------------------------- kernels


def _kernel_cases(target: GPT2, draft: GPT2 | None, table: KatzTable, tree: TreeConfig) -> Iterator[Case]:
    """A case for every kernel that a decoder with these models, table and tree launches."""
    for role, model in {"target": target, "draft": draft}.items():
        if model is None:
            continue
        width, inner = model.config.n_embd, model.config.n_inner or 4 * model.config.n_embd
        heads = f"{model.heads} heads of {model.head_size}"
        yield Case(f"{role}: embedding", f"{width}", partial(check_kernels.check_embed, model))
        for name, outputs, inputs, activation in (
            ("norm + qkv", 3 * width, width, "none"),
            ("norm + up + activation", inner, width, model.activation),
        ):
            run = partial(check_kernels.check_norm_linear, model, outputs, inputs, activation)
            yield Case(f"{role}: {name}", f"{outputs}x{inputs}", run)
        for name, outputs, inputs in (("projection + residual", width, width), ("down + residual", width, inner)):
            yield Case(
                f"{role}: {name}",
                f"{outputs}x{inputs}",
                partial(check_kernels.check_linear_add, model, outputs, inputs),
            )
        yield Case(f"{role}: tree attention", heads, partial(check_kernels.check_attention, model))
        yield Case(f"{role}: prompt attention", heads, partial(check_kernels.check_prompts, model))
        head = f"{model.vocab_size}x{width}"
        yield Case(f"{role}: head, logits", head, partial(check_kernels.check_head_logits, model))
        for sampling in WARPINGS:
            if role == "target":
                yield Case(
                    f"{role}: head, choice, {sampling}", head, partial(check_kernels.check_choice, model, sampling)
                )
            else:
                yield Case(
                    f"{role}: head, children, {sampling}", head, partial(check_kernels.check_children, model, sampling)
                )
        yield Case(f"{role}: KV rows moved", heads, partial(check_kernels.check_compact, model))
    for sampling in WARPINGS:
        yield Case(
            f"choice among logits, {sampling}",
            f"{target.vocab_size}",
            partial(check_kernels.check_rule, target, sampling),
        )
    yield Case(
        "n-gram look-up", f"{table.successors} successors", partial(check_trees.check_lookup, table, target.device)
    )
    for sampling, seed in (("greedy", None), ("sampled", 5)):
        run = partial(check_trees.check_growth, target, table, tree, seed)
        yield Case(f"tree growth, {sampling}", f"{tree.nodes} nodes", run)
    yield Case("verification and commit", f"{tree.nodes} nodes", partial(check_trees.check_verify, target, table, tree))


# ---------------------------------------------------------------- decoding


def _prompts(decoder: Decoder) -> list[list[int]]:
    """Prompts of different lengths, at most half of the model's positions; the last exceeds attention's window."""
    most = max(2, decoder.target.positions // 2)
    if decoder.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        sizes = [min(size, most) for size in (24, 9, 150)]
        return [torch.randint(decoder.target.vocab_size, (size,), generator=generator).tolist() for size in sizes]
    prompts = [decoder.tokenizer(text, add_special_tokens=False).input_ids[:most] for text in PROMPTS[:3]]
    return [*prompts[:2], list(islice(cycle(chain(*prompts)), min(150, most)))]


def _logits_case(decoder: Decoder, prompts: list[list[int]]) -> Case:
    sizes = 1, TREE.for_mode("chain").nodes

    def run() -> str:
        found = compare_logits(decoder, decoder, prompts, sizes)
        expect(found.identical, str(found))
        return str(found)

    return Case("target: logits of passes", f"{sizes[0]} and {sizes[1]} tokens", run)


def _decoding_cases(decoder: Decoder, modes: Sequence[str], prompts: list[list[int]]) -> Iterator[Case]:
    """Each mode on each prompt alone and on all at once, against plain decoding of each prompt alone."""
    longest = max(map(len, prompts))
    new_tokens = min(NEW_TOKENS, decoder.target.positions - longest)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def decoded(rows: slice, mode: str, sampling: str) -> list[list[int]]:
        """New tokens of the prompts in one batch. A seed for each row gives a row the same noise in any batch."""
        length = max(map(len, prompts[rows]))
        ids, seeds = padded[rows, longest - length :], [SEED] * len(padded[rows])
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "mode": mode,
            "tree": TREE,
            "eos_token_id": [],
            "pad_token_id": 0,
        }
        found = decoder.generate(ids, mask[rows, longest - length :], seed=seeds, **options, **SAMPLINGS[sampling])
        return found[:, length:].tolist()

    @cache
    def plain(sampling: str) -> list[list[int]]:
        alone = [slice(row, row + 1) for row in range(len(prompts))]
        return [decoded(rows, "autoregressive", sampling)[0] for rows in alone]

    def run(mode: str, sampling: str) -> str:
        wanted = plain(sampling)
        for rows in (slice(0, 1), slice(None)):
            found = decoded(rows, mode, sampling)
            for row, (tokens, expected) in enumerate(zip(found, wanted, strict=False)):
                at = next((at for at, pair in enumerate(zip(tokens, expected, strict=True)) if len({*pair}) > 1), None)
                where = "alone" if len(found) == 1 else f"in a batch of {len(found)}"
                expect(at is None, f"prompt {row} {where}: new token {at} is another one")
        return f"same tokens, {cast(Stats, decoder.last_stats).tokens_per_step:.2f} a step"

    for sampling in SAMPLINGS:
        for mode in ["autoregressive", *modes]:
            shape = f"{len(prompts)}x{new_tokens} tokens"
            yield Case(f"decoding: {mode}, {sampling}", shape, partial(run, mode, sampling))


# ---------------------------------------------------------------- the record


def record(decoder: Decoder, results: Sequence[Result], folder: Path | None = None) -> Path | None:
    """Records that the kernels passed on this GPU for these head sizes and this dtype; a failure removes the record.

    folder: instead of the user's cache, where backend "auto" looks. Returns the file, or None if nothing was written:
    after a failure, and on a CPU unless a folder is given.
    """
    on_gpu, passed = decoder.device.type == "cuda", bool(results) and all(result.passed for result in results)
    if folder is None and not on_gpu:
        return None
    setup = trusted.Setup.of(decoder.device)
    try:
        if passed:
            heads = sorted({model.head_size for model in (decoder.target, decoder.draft) if model is not None})
            return trusted.write(setup, heads, decoder.target.dtype, folder)
        trusted.forget(setup, folder)
        if on_gpu:  # even if another folder is given
            trusted.forget(setup)
    except RuntimeError as error:  # no home folder
        raise ValueError(f"the result cannot be kept: {error}; name a folder with --out") from None
    return None
