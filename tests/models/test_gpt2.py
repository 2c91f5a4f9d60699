"""The forward pass over trees against transformers on each path by itself, and the reading of checkpoints."""

import copy
import json
import math
import socket
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, VOCAB, make_gpt2, random_prompts
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.state.host import Sequences, Tree, Trees
from stagedspec.models.checkpoints import find
from stagedspec.models.gpt2 import GPT2, Cache, Reader, check_config, read_chunk
from stagedspec.models.loading import read_checkpoint

CPU = torch.device("cpu")


def make(model, dtype=torch.float32) -> GPT2:
    return GPT2(model, TorchBackend(), CPU, dtype)


def random_tree(root: int, parents: list[int], seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    tree = Tree.root(root)
    for node, parent in enumerate(parents, 1):
        tree.add(int(torch.randint(VOCAB - 10, (1,), generator=generator)) + node % 10, min(parent, node - 1), -1, 1)
    return tree


def tree_logits(model: GPT2, prompts, trees, nodes: int, chunk: int = 256) -> torch.Tensor:
    """Logits [B, N, V] of a prefill and one pass over the trees."""
    sequences = Sequences(prompts, 9, [], CPU)
    cache = Cache(model, len(prompts), nodes, max(map(len, prompts)) + 9)
    with torch.inference_mode():
        for start in range(0, max(map(len, prompts)) - 1, chunk):
            size = min(chunk, max(map(len, prompts)) - 1 - start)
            read_chunk(model, cache, sequences.chunk(start, size, model.kv_dtype), start)
        return model.logits(model.forward(Trees(sequences, trees, nodes).batch(model.kv_dtype), cache, 0))


def check_paths(model, prompts, trees, logits, tolerance=2e-4):
    """Every node's logits are those of transformers at the end of its path; all paths in one padded call."""
    paths, owners = [], []
    for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        for index, node in enumerate(tree.nodes):
            above = [at for at in range(index + 1) if node.mask >> at & 1]
            assert above[0] == 0 and len(above) == node.depth + 1
            paths.append(prompt[:-1] + [tree.nodes[at].token for at in above])
            owners.append((row, index))
    width = max(map(len, paths))
    with torch.no_grad():
        expected = model(torch.tensor([path + [0] * (width - len(path)) for path in paths])).logits
    for path, (row, node), values in zip(paths, owners, expected, strict=True):
        torch.testing.assert_close(logits[row, node], values[len(path) - 1], rtol=tolerance, atol=tolerance)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 15), max_size=15), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_random_trees(target, lengths, shapes, seed):
    prompts = random_prompts(lengths, seed=seed)
    trees = [random_tree(prompt[-1], shape, seed + row) for row, (prompt, shape) in enumerate(zip(prompts, shapes))]  # noqa: B905
    logits = tree_logits(make(target), prompts, trees, max(len(tree.nodes) for tree in trees))
    check_paths(target, prompts, trees, logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration(name):
    model = make_gpt2(3, **CONFIGS[name])
    prompts = random_prompts([6, 2], seed=2, vocab_size=50)
    trees = [random_tree(prompt[-1] % 50, [0, 0, 1, 3, 3], row) for row, prompt in enumerate(prompts)]
    for tree in trees:
        tree.nodes = [node._replace(token=node.token % 50) for node in tree.nodes]
    check_paths(model, prompts, trees, tree_logits(make(model), prompts, trees, 6))


def test_prefill_in_chunks(target):
    prompts = random_prompts([23, 9, 1], seed=5)
    trees = [random_tree(prompt[-1], [0, 1], 0) for prompt in prompts]
    for chunk in (1, 7, 256):
        check_paths(target, prompts, trees, tree_logits(make(target), prompts, trees, 3, chunk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_node_count_changes_nothing(target, dtype):
    """Bitwise: nodes of a tree among N = 1 to 33, in another batch, and with their ancestors committed."""
    model = make(target, dtype)
    prompts = random_prompts([7, 3], seed=6)
    parents = [node // 2 for node in range(32)]
    full = [random_tree(prompt[-1], parents, row) for row, prompt in enumerate(prompts)]
    reference = tree_logits(model, prompts, full, 33)
    if dtype == torch.float32:
        check_paths(target, prompts, full, reference)
    for nodes in (1, 2, 7, 16, 33):
        cut = [random_tree(prompt[-1], parents[: nodes - 1], row) for row, prompt in enumerate(prompts)]
        assert torch.equal(tree_logits(model, prompts, cut, nodes), reference[:, :nodes])
        assert torch.equal(tree_logits(model, prompts[1:], cut[1:], nodes)[0], reference[1, :nodes])
    for node in (1, 4, 20, 32):
        path = [full[0].nodes[at].token for at in range(node + 1) if full[0].nodes[node].mask >> at & 1]
        committed = tree_logits(model, [prompts[0] + path[1:]], [Tree.root(path[-1])], 1)
        assert torch.equal(committed[0, 0], reference[0, node]), node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(target, dtype):
    """At most twice the error of transformers in the same precision."""
    (prompt,) = random_prompts([20], seed=7)
    tree = random_tree(prompt[-1], [], 0)
    ours = tree_logits(make(target, dtype), [prompt], [tree], 1)[0, 0]
    with torch.no_grad():
        exact = target(torch.tensor([prompt])).logits[0, -1]
        theirs = copy.deepcopy(target).to(dtype)(torch.tensor([prompt])).logits[0, -1].float()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_unused_cache_rows_do_not_matter(target):
    """Large values wherever nothing was written."""
    model, prompts = make(target), random_prompts([6, 2], seed=8)
    trees = [random_tree(prompt[-1], [0, 0, 1], row) for row, prompt in enumerate(prompts)]
    sequences = Sequences(prompts, 9, [], CPU)
    cache = Cache(model, 2, 4, 15)
    with torch.inference_mode():
        Reader(model, cache, sequences).read(5)
        cache.rows[:, :, :4] = 1e4
        cache.rows[:, 1, 4 + 1 :] = 1e4
        cache.rows[:, 0, 4 + 5 :] = 1e4
        logits = model.logits(model.forward(Trees(sequences, trees, 4).batch(model.kv_dtype), cache, 0))
    check_paths(target, prompts, trees, logits)


def test_a_new_cache_holds_zeros(target):
    """Whatever was in that memory: masked rows are multiplied by zero, and zero times NaN is NaN."""
    torch.use_deterministic_algorithms(True)  # then torch fills memory that nobody has written to with NaN
    try:
        assert torch.empty(3).isnan().all()
        rows = Cache(make(target), 2, 4, 15).rows
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.eq(0).all()


def test_changes_of_the_config_come_too_late():
    """The config of the weights is a copy."""
    model = make_gpt2(0)
    weights = make(model)
    before = weights.weight_bytes
    model.config.n_layer, model.config.n_embd = 9, 9
    assert weights.weight_bytes == before


def test_the_widest_heads_of_a_backend(monkeypatch):
    model = make_gpt2(0, n_layer=1)  # of heads 24 / 4 wide
    monkeypatch.setattr(TorchBackend, "max_head_size", 6)
    make(model)
    monkeypatch.setattr(TorchBackend, "max_head_size", 5)
    with pytest.raises(ValueError, match="can be at most 5 wide, the model's are 6"):
        make(model)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def folder(tmp_path):
    make_gpt2(0, n_layer=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    model = make_gpt2(1, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        read = read_checkpoint(source, "target")
        ours, theirs = read.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_checkpoint(model, "draft") is model


def test_a_folder_below_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_checkpoint("~/model", "target").config.n_layer == 1
    assert find("~/model", "target") == folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(tensors | {name: edit(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def to_broken_link(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder / "gone")


def to_bare_index(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    weights = {"weight_map": {"transformer.wte.weight": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


DAMAGE = {
    "truncated": (lambda f: truncate(f, 9000), "target.*cannot be loaded"),
    "truncated-header": (lambda f: truncate(f, 20), "target.*cannot be loaded"),
    "a-pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "target.*cannot be loaded.*only points to the weights: fetch them with `git lfs pull`",
    ),
    "empty-weights": (lambda f: truncate(f, 0), "target.*cannot be loaded"),
    "no-config": (lambda f: (f / "config.json").unlink(), "no config.json.*save_pretrained"),
    "config-not-json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config-a-list": (lambda f: (f / "config.json").write_text("[]"), "list.*expected model_type 'gpt2'"),
    "other-model": (lambda f: edit_config(f, model_type="llama"), "'llama'.*expected model_type 'gpt2'"),
    "pickle-only": (to_pickle, "no .safetensors.*[Pp]ickled"),
    "cross-attention": (lambda f: edit_config(f, add_cross_attention=True), "add_cross_attention"),
    "unknown-activation": (lambda f: edit_config(f, activation_function="swoosh"), "activation_function 'swoosh'"),
    "heads-do-not-divide": (lambda f: edit_config(f, n_head=5), "divisible by n_head.*24 and 5"),
    "no-heads": (lambda f: edit_config(f, n_head=0), "n_head"),
    "size-not-a-number": (lambda f: edit_config(f, n_embd="wide"), "n_embd"),
    "other-vocabulary": (lambda f: edit_config(f, vocab_size=77), "target"),
    "not-finite": (lambda f: change(f, lambda weight: weight * math.nan), "damaged: .* finite"),
    "infinite": (
        lambda f: change(f, lambda weight: weight.clone().index_fill_(0, torch.tensor([0]), math.inf)),
        "damaged: .* finite",
    ),
    "minus-infinite": (
        lambda f: change(f, lambda weight: weight.clone().index_fill_(0, torch.tensor([0]), -math.inf)),
        "damaged: .* finite",
    ),
    "whole-numbers": (
        lambda f: change(f, lambda weight: weight.long()),
        "must be floating-point, it is I64",
    ),
    "broken-link": (to_broken_link, "a link to a file that is not there"),
    "index-without-metadata": (to_bare_index, "expected JSON with metadata and a weight_map"),
    "missing-weight": (lambda f: drop(f, "transformer.h.0.mlp.c_fc.weight"), "missing.*c_fc.weight"),
    "too-many-layers": (lambda f: edit_config(f, n_layer=2), "missing.*h.1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_checkpoint(folder, "target")


def test_nothing_is_unpickled(folder, tmp_path):
    """A pickle that would leave a mark if it were loaded."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        read_checkpoint(folder, "target")
    assert not (tmp_path / "mark").exists()


def test_missing_checkpoints(tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none-such-folder"):
        with pytest.raises(ValueError, match="draft: no checkpoint folder at"):
            read_checkpoint(source, "draft")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"draft: .*file is a file; expected a folder written by save_pretrained"):
        read_checkpoint(tmp_path / "file", "draft")
    with pytest.raises(ValueError, match="target must be a hub id, a folder or a GPT2LMHeadModel, got int"):
        read_checkpoint(5, "target")


@pytest.mark.parametrize("how", ["offline", "no-network"])
def test_hub_id_without_network(monkeypatch, how):
    """Says so at once, and what to do."""

    def unreachable(*_, **__):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    message = r"target: 'none/such' is no local folder.*hub cannot be reached.*Connect to the network, or give a folder"
    with pytest.raises(ValueError, match=message):
        read_checkpoint("none/such", "target")
    with pytest.raises(ValueError, match="'no such model!' is neither a local folder nor a hub id"):
        read_checkpoint("no such model!", "target")


def test_config_of_a_model_object():
    model = make_gpt2(0, n_layer=1)
    model.config.model_type = "other"
    with pytest.raises(ValueError, match=r"model_type 'gpt2'.*'other'"):
        check_config(model.config)
    assert isinstance(model, GPT2LMHeadModel)
