"""Which files of a checkpoint count: those that transformers reads, in a folder and in the hub's cache."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from helpers import byte_tokenizer, make_gpt2
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from stagedspec import Decoder
from stagedspec.models import checkpoints
from stagedspec.models.loading import load_tokenizer, no_bars, read_checkpoint

WEIGHTS, INDEX = checkpoints.WEIGHTS, checkpoints.INDEX


def add(folder, tensors):
    """Tensors that are not the model's, in the model's own file."""
    path = folder / WEIGHTS
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def shard(folder):
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()


def stale_shard(folder):
    shard(folder)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"cut")


HARMLESS = {
    "an-ngram-table": lambda f: save_file({"tokens": torch.zeros(3, dtype=torch.int64)}, f / "ngram.safetensors"),
    "an-optimizer": lambda f: save_file({"step": torch.zeros(1, dtype=torch.int32)}, f / "optimizer.safetensors"),
    "a-damaged-file": lambda f: (f / "adapter.safetensors").write_bytes(b"cut"),
    "pickles": lambda f: (f / "optimizer.pt").write_bytes(b"no pickle"),
    "pickled-weights-too": lambda f: (f / "pytorch_model.bin").write_bytes(b"no pickle"),
    "whole-numbers-of-no-weight": lambda f: add(f, {"transformer.h.0.attn.bias": torch.ones(4, dtype=torch.uint8),
                                                    "position_ids": torch.arange(4)}),
    "shards": shard,
    "a-stale-shard": stale_shard,
    "a-stale-index": lambda f: (f / INDEX).write_text("{"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    make_gpt2(1).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", HARMLESS)
def test_other_files_do_not_matter(folder, case):
    HARMLESS[case](folder)
    read, expected = read_checkpoint(folder, "target").state_dict(), make_gpt2(1).state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def rename(folder, name):
    (folder / WEIGHTS).rename(folder / name)


def missing_shard(folder):
    shard(folder)
    min(folder.glob("model-*.safetensors")).unlink()


def index_alone(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)


REFUSED = {
    "other-name": (lambda f: rename(f, "weights.safetensors"), "no .safetensors weights .*but weights.safetensors"),
    "missing-shard": (missing_shard, "target: .*cannot be loaded: .*model-00001"),
    "damaged-index": (lambda f: index_alone(f, "{"), "index.json cannot be loaded: expected JSON with metadata"),
    "index-of-a-list": (lambda f: index_alone(f, "[]"), "index.json cannot be loaded: expected JSON with metadata"),
    "adapter-alone": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds an adapter without its model; merge it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_matter(folder, case):
    damage, message = REFUSED[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder, "target")


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "pkl"])
def test_pickled_weights_are_told(folder, ending):
    rename(folder, f"pytorch_model.{ending}")
    with pytest.raises(ValueError, match="Pickled weights are never loaded: convert them"):
        read_checkpoint(folder, "target")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before(folder, shown):
    """transformers' own do not show while a folder is read; then whoever had switched them off has them off."""
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with no_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# ---------------------------------------------------------------- tokenizers


def bert(folder):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


TOKENIZERS = {
    "none": (lambda f: None, None),
    "settings-alone": (lambda f: (f / "tokenizer_config.json").write_text("{}"), None),
    "another-kind-without-its-files": (lambda f: (bert(f), (f / "vocab.txt").unlink()), None),
    "another-kind": (bert, "hello world"),
    "bytes": (lambda f: byte_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet())).save_pretrained(f), "hello world"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_of_special_tokens_is_none(folder, case):
    make, text = TOKENIZERS[case]
    make(folder)
    tokenizer = load_tokenizer(folder)
    if text is None:
        assert tokenizer is None
    else:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    shutil.copytree(folder, folder.with_name("draft"))
    assert Decoder.from_pretrained(folder, draft=folder.with_name("draft"), device="cpu").draft is not None


# ---------------------------------------------------------------- the hub's cache

HUB = """
import sys
from stagedspec.models.loading import load_tokenizer, read_checkpoint
for name in sys.argv[1:]:
    try:
        print(name, "loads", read_checkpoint(name, "target").lm_head.weight.sum().item(), load_tokenizer(name))
    except ValueError as error:
        print(name, error)
"""


@pytest.mark.slow
def test_repositories_of_the_cache_get_the_words_of_folders(folder, tmp_path):
    def no_weights(path):
        (path / WEIGHTS).unlink()

    def pickled(path):
        (path / WEIGHTS).rename(path / "pytorch_model.bin")

    def llama(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))

    def whole_numbers(path):
        add(path, {"transformer.ln_f.weight": torch.ones(24, dtype=torch.int64)})

    changes = {"plain": lambda path: None, "shards": shard, "stray": HARMLESS["an-ngram-table"], "pickled": pickled,
               "no-weights": no_weights, "llama": llama, "whole-numbers": whole_numbers}  # fmt: skip
    for name, change in changes.items():
        repository = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        change(repository / "snapshots" / "abc")
    names = [f"me/{name}" for name in (*changes, "absent")]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, *names], env=environment, capture_output=True, text=True, check=True
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name in ("plain", "shards", "stray"):
        assert said[f"me/{name}"].startswith("loads") and said[f"me/{name}"].endswith("None")
    assert "me/pickled has no .safetensors weights" in said["me/pickled"] and "network" not in said["me/pickled"]
    assert "has no weights in the local cache, and the model hub cannot be reached" in said["me/no-weights"]
    assert "me/llama holds a 'llama' model; expected model_type 'gpt2'" in said["me/llama"]
    assert "ln_f.weight must be floating-point, it is I64" in said["me/whole-numbers"]
    assert "is not in the local cache, and the model hub cannot be reached" in said["me/absent"]


@pytest.mark.parametrize("lacking", [(), (WEIGHTS,), (INDEX,), (WEIGHTS, INDEX)], ids=str)
def test_repositories_known_to_lack_weights(monkeypatch, lacking):
    """Only where the hub has said so of both files."""

    def found(name, file):
        return huggingface_hub._CACHED_NO_EXIST if file in lacking else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    assert checkpoints.known_to_lack_weights("me/model") is (len(lacking) == 2)
