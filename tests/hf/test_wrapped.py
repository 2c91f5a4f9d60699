"""custom_generate behind code of the user's own: the streamer and the assistant arrive, and no reader of a stream waits
forever."""

import asyncio
import contextlib
import copy
import functools
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import byte_tokenizer, random_prompts
from test_hf import TOKENS, Records
from transformers import GPT2LMHeadModel, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

from stagedspec import TreeConfig
from stagedspec.hf import custom_generate

TREE = TreeConfig()
IDS = torch.tensor(random_prompts([5], seed=81))


def decorated(inner):
    @functools.wraps(inner)
    def call(*args, **kwargs):
        return inner(*args, **kwargs)

    return call


def deep(inner, levels=20):
    return inner if levels == 0 else deep(lambda *args, **kwargs: inner(*args, **kwargs), levels - 1)


class Timer:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        with contextlib.ExitStack():
            return self.inner(*args, **kwargs)


class Sub(custom_generate):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def of_parts(inner):
    """Takes the arguments by name, and changes the config."""

    def call(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        config = copy.deepcopy(generation_config)
        return inner(
            model=model, input_ids=input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            generation_config=config, **kwargs,
        )  # fmt: skip

    return call


def in_a_pool(inner):
    def call(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(inner, *args, **kwargs).result()

    return call


def in_a_loop(inner):
    async def later(*args, **kwargs):
        return inner(*args, **kwargs)

    return lambda *args, **kwargs: asyncio.run(later(*args, **kwargs))


def in_a_generator(inner):
    def run(*args, **kwargs):
        yield inner(*args, **kwargs)

    return lambda *args, **kwargs: next(run(*args, **kwargs))


WRAPPERS = {
    "bare": lambda inner: inner,
    "lambda": lambda inner: lambda *args, **kwargs: inner(*args, **kwargs),
    "deep": deep,
    "partial": lambda inner: functools.partial(inner, mode="chain"),
    "decorated": decorated,
    "object": Timer,
    "by-name": of_parts,
    "pool": in_a_pool,
    "loop": in_a_loop,
    "generator": in_a_generator,
    "no-grad": torch.no_grad(),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_streamer_and_assistant_arrive(target, drafts, name):
    theirs, ours = Records(), Records()
    expected = target.generate(IDS, max_new_tokens=12, streamer=theirs)
    inner = custom_generate(tree=TREE)
    found = target.generate(
        IDS, max_new_tokens=12, streamer=ours, assistant_model=drafts["good"], custom_generate=WRAPPERS[name](inner)
    )
    assert torch.equal(found, expected) and ours.calls == theirs.calls
    assert inner.last_stats.draft_passes > 0


def test_a_subclass(target, drafts):
    ours, theirs = Records(), Records()
    expected = target.generate(IDS, max_new_tokens=12, streamer=theirs)
    found = target.generate(IDS, max_new_tokens=12, streamer=ours, custom_generate=Sub(drafts["good"], tree=TREE))
    assert torch.equal(found, expected) and ours.calls == theirs.calls


def test_a_generate_that_was_replaced(target, drafts, monkeypatch):
    """As loggers do, without a word of what they wrap."""
    real = GPT2LMHeadModel.generate
    monkeypatch.setattr(GPT2LMHeadModel, "generate", lambda *args, **kwargs: real(*args, **kwargs))
    ours, theirs = Records(), Records()
    expected = target.generate(IDS, max_new_tokens=12, streamer=theirs)
    found = target.generate(IDS, max_new_tokens=12, streamer=ours, custom_generate=custom_generate(drafts["good"]))
    assert torch.equal(found, expected) and ours.calls == theirs.calls


def test_a_generate_inside_another(target, drafts):
    """The inner one has a streamer of its own, or none."""
    outer, inner = Records(), Records()
    generator = custom_generate(drafts["good"], tree=TREE)

    def nested(model, input_ids, *args, **kwargs):
        model.generate(input_ids, max_new_tokens=3, streamer=inner, custom_generate=generator)
        model.generate(input_ids, max_new_tokens=3, custom_generate=generator)
        return generator(model, input_ids, *args, **kwargs)

    theirs = Records()
    target.generate(IDS, max_new_tokens=12, streamer=theirs)
    target.generate(IDS, max_new_tokens=12, streamer=outer, custom_generate=nested)
    assert outer.calls == theirs.calls and len(inner.calls) == 1 + 3 + 1


def test_two_threads(target, drafts):
    """Each call finds its own generate, also from threads of a pool."""
    generator = in_a_pool(custom_generate(drafts["good"], tree=TREE))
    prompts = [torch.tensor(random_prompts([5], seed=seed)) for seed in range(82, 86)]
    records = [Records() for _ in prompts]

    def generate(ids, streamer):
        target.generate(ids, max_new_tokens=12, streamer=streamer, custom_generate=generator)

    threads = [threading.Thread(target=generate, args=pair) for pair in zip(prompts, records, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids, ours in zip(prompts, records, strict=True):
        theirs = Records()
        target.generate(ids, max_new_tokens=12, streamer=theirs)
        assert ours.calls == theirs.calls


def test_without_a_generate(target, drafts):
    config = copy.deepcopy(target.generation_config)
    with pytest.raises(ValueError, match=r"not by the generate of a transformers model, .* would be lost: give it to"):
        custom_generate(drafts["good"])(target, IDS, LogitsProcessorList(), StoppingCriteriaList(), config)


def test_a_generate_without_custom_generate_is_none(target, drafts):
    """It has not called: what it was given is not for this object."""
    custom, config = custom_generate(drafts["good"]), copy.deepcopy(target.generation_config)

    def calls(ids, scores):
        return custom(target, ids, LogitsProcessorList(), StoppingCriteriaList(), config)

    with pytest.raises(ValueError, match="not by the generate of a transformers model"):
        target.generate(IDS, max_new_tokens=2, logits_processor=[calls])


def failing(ids, scores):
    raise RuntimeError("mine")


FAILURES = {
    "setting": ({"guidance_scale": 1.5}, ValueError),
    "no-draft": ({}, ValueError),
    "too-long": ({"max_new_tokens": 10**4}, ValueError),
    "processor": ({"logits_processor": [failing], "mode": "autoregressive"}, RuntimeError),
    "criterion": ({"stopping_criteria": [failing], "mode": "autoregressive"}, RuntimeError),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("entrance", ["decoder", "custom"])
def test_a_stream_ends_where_its_generation_fails(target, make_decoder, name, entrance):
    options, kind = FAILURES[name]
    streamer = TextIteratorStreamer(byte_tokenizer(TOKENS), timeout=60)
    generate = make_decoder(target).generate
    if entrance == "custom":
        generate = functools.partial(target.generate, custom_generate=custom_generate())
    with pytest.raises(kind):
        generate(IDS, streamer=streamer, **({"max_new_tokens": 4} | options))
    try:
        list(streamer)
    except queue.Empty:
        pytest.fail("a reader of the stream would have waited")


class Broken(Records):
    def put(self, value):
        raise RuntimeError("full")

    def end(self):
        raise RuntimeError("closed")


def test_the_error_of_a_streamer_is_told(target, make_decoder):
    with pytest.raises(RuntimeError, match="full"):
        make_decoder(target).generate(IDS, max_new_tokens=4, mode="autoregressive", streamer=Broken())
