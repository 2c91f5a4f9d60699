"""`stagedspec.ray.Complete` as Ray Data calls it, without Ray: bench/ray_check.py runs it on a local Ray."""

import shutil
import string

import numpy as np
import pytest
from helpers import VOCAB, byte_tokenizer, make_draft, make_gpt2
from test_packaging import run_in_root
from transformers import GenerationConfig

from stagedspec import Decoder, row_seed
from stagedspec.ray import Complete

TEXTS = ["ab", "hello", "", "Zq9", "x" * 60, "many"]
OPTIONS = {"max_new_tokens": 9, "batch": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):

    folder = tmp_path_factory.mktemp("models")
    target = make_gpt2(0)
    tokens = [*string.ascii_letters, "Ġ", "Ċ", *string.digits][:VOCAB]
    for name, model in (("target", target), ("draft", make_draft("random", target))):
        model.save_pretrained(folder / name)
        byte_tokenizer(tokens).save_pretrained(folder / name)
    return str(folder / "target"), {"draft": str(folder / "draft"), "device": "cpu"}


def batch(texts, **columns) -> dict[str, np.ndarray]:
    return {"prompt": np.array(texts, dtype=object), "id": np.arange(len(texts))} | columns


def test_parts_give_what_the_whole_gives(folders):
    """Whatever batches and actors the rows come to, with columns that are not its own kept."""
    target, made = folders
    options = OPTIONS | {"do_sample": True, "temperature": 1.5}
    whole = list(Decoder.from_pretrained(target, **made).complete_many(TEXTS, seed=3, **options))
    seeds = np.array([row_seed(3, index) for index in range(len(TEXTS))])
    actors = [Complete(target, decoder=made, seed_field="own", **options) for _ in range(2)]
    found = []
    for number, part in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        rows = batch(TEXTS, own=seeds)
        given = {name: column[part] for name, column in rows.items()}
        result = actors[number % 2](given)
        assert all(result[name] is column for name, column in given.items())
        found += zip(result["text"], result["finish_reason"], result["error"], strict=True)
    assert found == [(one.text, one.finish_reason, one.error or "") for one in whole]
    assert {reason for _, reason, _ in found} == {"length", "skipped"}
    with pytest.raises(ValueError, match=r"seed must be an integer of 64 bits, got 1\.5"):
        actors[0](batch(TEXTS, own=np.full(6, 1.5)))


def test_names_of_columns(folders):
    target, made = folders
    complete = Complete(target, decoder=made, field="code", text_field="completion", mode="autoregressive", **OPTIONS)
    result = complete({"code": np.array(["ab"])})  # of numpy's own text
    expected = Decoder.from_pretrained(target, **made).complete("ab", 9, mode="autoregressive")
    assert result["completion"].tolist() == [expected.text] and set(result) == {
        "code", "completion", "finish_reason", "error"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no column 'code' among 'prompt', 'id'"):
        complete(batch(["ab"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "takes no seed: give a column of seeds"),
        ({"num_samples": 2}, "takes no num_samples: give a row for each"),
        ({"do_sample": True, "max_new_tokens": 9}, "sampling needs a seed for each row"),
        ({"temperature": -1.0, "do_sample": True, "seed_field": "s"}, "temperature must be"),
        ({"max_new_tokens": 49}, "n_positions"),
    ],
)
def test_bad_options_when_the_actor_starts(folders, options, message):
    target, made = folders
    with pytest.raises(ValueError, match=message):
        Complete(target, decoder=made, **options)


def test_sampling_that_the_model_asks_for_needs_seeds(folders, tmp_path):
    target, made = folders
    copy = tmp_path / "sampling"
    shutil.copytree(target, copy)
    GenerationConfig(do_sample=True).save_pretrained(copy)
    with pytest.raises(ValueError, match="sampling needs a seed for each row"):
        Complete(str(copy), decoder=made, **OPTIONS)
    assert Complete(str(copy), decoder=made, do_sample=False, **OPTIONS)(batch(["ab"]))["error"] == [""]
    asked = OPTIONS | {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=9)}
    with pytest.raises(ValueError, match="sampling needs a seed for each row"):
        Complete(target, decoder=made, **asked)


def test_it_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import stagedspec.ray as r; print(r.Complete.__name__)"
    assert run_in_root(code) == "Complete"
