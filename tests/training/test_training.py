"""Training: the loop, sampling, distillation, and the whole recipe on tiny models."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from stagedspec.decoder import Decoder
from stagedspec.models.ngram import KatzTable
from stagedspec.training import corpus as corpus_module
from stagedspec.training import distil, recipe, sample, state
from stagedspec.training import fit as fit_module
from stagedspec.training.card import source_line
from stagedspec.training.fit import FitConfig, cross_entropy, fit, heldout_blocks, heldout_loss, sample_blocks

VOCAB = 24


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(seed: int = 0, width: int = 16, spread: float = 0.02) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    settings = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=width,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(settings).eval()


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    """Tokens that are easy to learn: the next one is the last one plus 1 or 2."""
    steps = torch.randint(1, 3, (4000,), generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0) % VOCAB


def run_fit(model, config, folder, tokens, report=lambda values: None, **options):
    return fit(
        model, config, folder, lambda step: sample_blocks(tokens, config, step), cross_entropy, report, **options
    )


# ---- the loop


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(tmp_path, stream, optimizer):
    model = tiny_model()
    config = FitConfig(tokens=80 * 8 * 16, batch=8, block=16, learning_rate=1e-2, optimizer=optimizer)
    reports = []
    before = heldout_loss(model, stream[:500], 16)
    run_fit(model, config, tmp_path, stream, reports.append, evaluate=lambda: {"seen": 1}, evaluate_every=40)
    assert heldout_loss(model, stream[:500], 16) < before - 1
    assert [values["step"] for values in reports] == list(range(1, 81))
    assert [values["step"] for values in reports if "seen" in values] == [40, 80]
    assert all(values["tokens_per_second"] > 0 and values["tflops"] > 0 for values in reports)
    assert not model.training


class Killed(Exception):
    pass


def test_a_resumed_run_is_bitwise_an_uninterrupted_one(tmp_path, stream):
    config = FitConfig(tokens=20 * 4 * 16, batch=4, block=16, learning_rate=1e-2, checkpoint_seconds=0)
    whole = run_fit(tiny_model(), config, tmp_path / "whole", stream)

    def kill(values):
        if values["step"] in (7, 13):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            run_fit(tiny_model(), config, tmp_path / "killed", stream, kill)
    resumed = run_fit(tiny_model(), config, tmp_path / "killed", stream)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = [load_file(tmp_path / name / state.CHECKPOINT) for name in ("whole", "killed")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_micro_batches_add_up_to_the_batch(tmp_path, stream):
    config = FitConfig(tokens=5 * 8 * 16, batch=8, block=16, learning_rate=1e-2)
    whole = run_fit(tiny_model(), config, tmp_path / "whole", stream)
    parts = run_fit(tiny_model(), config, tmp_path / "parts", stream, micro_batch=2)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True], ids=["cross_entropy", "distillation"])
def test_a_compiled_layer_serves_all_and_is_causal_without_a_mask(stream, distilled):
    """What a GPU run compiles is one graph a model, whatever its depth, whose attention has no mask tensor, with the
    same loss; an evaluation compiles nothing."""
    settings = tiny_model().config
    settings.n_layer = 10  # more than there may be graphs of one function
    torch.manual_seed(0)
    model, target, blocks = GPT2LMHeadModel(settings).train(), tiny_model(1, width=8), stream[:68].view(4, 17)
    loss_of = distil.distillation_loss(target) if distilled else cross_entropy
    wanted = loss_of(model, blocks)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for each in (model, target):
        fit_module.compile_layers(each, backend=keep, fullgraph=True)
    with fit_module.causal_attention(model, target):
        loss = loss_of(model, blocks)
    assert len(graphs) == 1 + distilled
    for graph in graphs:
        (call,) = (node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        assert call.kwargs["attn_mask"] is None and call.kwargs["is_causal"]
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loss, wanted)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(loss_of(model.eval(), blocks), wanted)
    assert len(graphs) == 1 + distilled


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 0},
        {"batch": 0},
        {"block": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup": 2.0},
        {"weight_decay": -1.0},
        {"final_learning_rate": math.nan},
        {"seconds": 0.0},
        {"seconds": math.inf},
        {"optimizer": "sgd"},
        {"shallow_layers": 0},
        {"shallow_share": 1.5},
    ],
    ids=str,
)
def test_fit_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FitConfig(**{"tokens": 100, **settings})


def test_fit_refuses_foreign_and_damaged_checkpoints(tmp_path, stream):
    config = FitConfig(tokens=64, batch=4, block=16)
    run_fit(tiny_model(), config, tmp_path, stream)
    with pytest.raises(ValueError, match="learning_rate"):
        run_fit(tiny_model(), FitConfig(tokens=64, batch=4, block=16, learning_rate=1.0), tmp_path, stream)
    with pytest.raises(ValueError, match="another shape"):
        run_fit(tiny_model(width=8), config, tmp_path, stream)
    with pytest.raises(ValueError, match="train first"):
        fit_module.load_weights(tiny_model(), tmp_path / "nothing", config)
    with pytest.raises(ValueError, match="micro_batch"):
        run_fit(tiny_model(), config, tmp_path, stream, micro_batch=3)
    path = tmp_path / state.CHECKPOINT
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        run_fit(tiny_model(), config, tmp_path, stream)


def test_a_diverging_loss_is_an_error(tmp_path, stream):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="learning_rate"):
        run_fit(model, FitConfig(tokens=64, batch=4, block=16), tmp_path, stream)


def test_too_few_tokens():
    with pytest.raises(ValueError, match="held-out part has 16 tokens"):
        heldout_blocks(torch.zeros(16, dtype=torch.long), 16)
    with pytest.raises(ValueError, match="16 training tokens"):
        sample_blocks(torch.zeros(16, dtype=torch.long), FitConfig(tokens=16, block=16), 0)


def test_seeds_and_steps_do_not_share_batches(stream):
    configs = [FitConfig(tokens=8000, batch=2, block=16, seed=seed) for seed in range(3)]
    batches = {tuple(sample_blocks(stream, config, step).flatten().tolist()) for config in configs for step in range(3)}
    assert len(batches) == 9


def test_a_resumed_run_may_keep_its_checkpoints_at_other_times(tmp_path, stream):
    config = FitConfig(tokens=64, batch=2, block=16)
    trained = run_fit(tiny_model(), config, tmp_path, stream)
    found = fit_module.load_weights(tiny_model(3), tmp_path, replace(config, checkpoint_seconds=7.0))
    assert torch.equal(found.lm_head.weight, trained.lm_head.weight)
    with pytest.raises(ValueError, match="was written with seed=0, not 1"):
        fit_module.load_weights(tiny_model(3), tmp_path, replace(config, seed=1))


# ---- optimizers, budgets and depth


def test_muon_takes_the_matrices_of_the_layers(stream):
    model = tiny_model()
    adamw, muon = state.make_optimizers(model, "muon", 1e-2, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [[names[id(p)] for group in each.param_groups for p in group["params"]] for each in (muon, adamw)]
    assert sorted(taken[0]) == sorted(
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    assert sorted([*taken[0], *taken[1]]) == sorted(names.values())
    (alone,) = state.make_optimizers(model, "adamw", 1e-2, 0.1)
    for optimizer in (adamw, alone):
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for group in optimizer.param_groups
                   for p in group["params"])  # fmt: skip


class Clock:
    """A clock that a test advances, in place of `time`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(fit_module, "time", self)

    def perf_counter(self) -> float:
        return self.now


def test_a_budget_of_seconds(tmp_path, stream, monkeypatch):
    """Ends when they are over, at the end of its schedule; a run that was killed goes on with what was left."""
    clock, rates, reports = Clock(monkeypatch), [], []
    config = FitConfig(tokens=1, seconds=20, batch=2, block=16, checkpoint_seconds=0, final_learning_rate=0.1)
    rate_at = FitConfig.rate_at
    monkeypatch.setattr(FitConfig, "rate_at", lambda self, at: rates.append(rate_at(self, at)) or rates[-1])

    def batch_at(step):
        clock.now += 1.0 if step < 8 else 0.5  # as on a machine that gets faster
        return sample_blocks(stream, config, step)

    def report(values):
        reports.append(values)
        if values["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        fit(tiny_model(), config, tmp_path, batch_at, cross_entropy, report)
    at = state.position_of(tmp_path)
    assert (at.step, at.seconds, at.layers) == (8, 8.0, 1) and at.progress == pytest.approx(0.4)
    clock.now += 1000
    fit(tiny_model(), config, tmp_path, batch_at, cross_entropy, lambda values: reports.append(values))
    assert [values["step"] for values in reports] == list(range(1, 33))
    assert reports[7]["steps"] == 20 and reports[-1]["steps"] == 32
    assert rates[0] < config.learning_rate < 1.02 * max(rates) and rates[-1] < 0.15 * max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert state.position_of(tmp_path).progress == 1


def test_copies_of_layers_change_nothing_at_first(stream):
    """A model whose layers were repeated computes what it did before; every copy has its source's weights and moments,
    but for the weights of what it adds."""
    torch.manual_seed(0)
    settings = tiny_model(spread=0.3).config
    settings.n_layer = 5
    deep = GPT2LMHeadModel(settings).eval()
    layers = list(deep.transformer.h)
    fit_module.set_layers(deep, layers[:2])
    optimizers = state.make_optimizers(deep, "muon", 1e-3, 0.1)
    cross_entropy(deep, stream[:34].view(2, 17)).backward()
    for optimizer in optimizers:
        optimizer.step()
    blocks = stream[34:68].view(2, 17)
    before = cross_entropy(deep, blocks).item()
    shallow = {name: value.clone() for name, value in state.state_of(deep, optimizers).items()}
    fit_module.set_layers(deep, layers)
    optimizers = state.make_optimizers(deep, "muon", 1e-3, 0.1)
    state.load_state(deep, optimizers, state.deeper(shallow, 2, 5))
    assert cross_entropy(deep, blocks).item() == pytest.approx(before, abs=1e-5)
    found = state.state_of(deep, optimizers)
    for index, source in enumerate((0, 0, 0, 1, 1)):
        for name in ("weight", "momentum_buffer"):
            assert torch.equal(*(x[f"{name}.transformer.h.{i}.mlp.c_fc.weight"]
                                 for x, i in ((found, index), (shallow, source))))  # fmt: skip
        adds = found[f"weight.transformer.h.{index}.mlp.c_proj.weight"]
        wanted = shallow[f"weight.transformer.h.{source}.mlp.c_proj.weight"]
        assert torch.equal(adds, wanted if index in (0, 3) else torch.zeros_like(wanted))
    assert torch.equal(found["exp_avg.transformer.wte.weight"], shallow["exp_avg.transformer.wte.weight"])


def test_a_run_grows_and_resumes_bitwise(tmp_path, stream):
    """With layers added after 60% of the steps, killed before and after, it ends as an uninterrupted one."""
    settings = tiny_model().config
    settings.n_layer = 3

    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(settings)

    config = FitConfig(
        tokens=10 * 4 * 16, batch=4, block=16, optimizer="muon", shallow_layers=1, checkpoint_seconds=0
    )  # fmt: skip
    reports = []
    whole = run_fit(model(), config, tmp_path / "whole", stream, reports.append)
    assert [values["layers"] for values in reports] == [1] * 6 + [3] * 4
    assert reports[5]["tflops"] > 0 and len(whole.transformer.h) == 3
    deeper = reports[6]["loss"] / reports[5]["loss"]
    assert deeper < 1.1  # it does not jump

    def kill(values):
        if values["step"] in (4, 6, 8):
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            run_fit(model(), config, tmp_path / "killed", stream, kill)
    assert state.position_of(tmp_path / "killed")[3] == 3
    resumed = run_fit(model(), config, tmp_path / "killed", stream)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    found = fit_module.load_weights(model(), tmp_path / "killed", config)
    assert torch.equal(found.transformer.h[2].mlp.c_fc.weight, whole.transformer.h[2].mlp.c_fc.weight)


@pytest.mark.parametrize("budget", [{"tokens": 1}, {"tokens": 1, "seconds": 1e-9}], ids=str)
def test_a_short_run_has_its_whole_depth_in_the_end(tmp_path, stream, budget):
    settings = tiny_model().config
    settings.n_layer = 2
    config = FitConfig(**budget, batch=2, block=16, shallow_layers=1, shallow_share=1.0)
    run_fit(GPT2LMHeadModel(settings), config, tmp_path, stream)
    at = state.position_of(tmp_path)
    assert (at.layers, at.progress) == (2, 1.0)


# ---- sampling


def decoder_of(model: GPT2LMHeadModel) -> Decoder:
    return Decoder.from_pretrained(model, device="cpu")


def test_rows_do_not_depend_on_batches():
    """And each has noise of its own."""
    decoder, prompts = decoder_of(tiny_model(spread=0.5)), torch.arange(70)[:, None] % 3
    settings = {"temperature": 1.0, "seed": 2, "top_k": 5}
    rows = sample.sample_rows(decoder, prompts, 9, **settings)
    assert rows.shape == (70, 9) and torch.equal(rows[:, :1], prompts) and len(set(map(tuple, rows.tolist()))) > 50
    assert torch.equal(rows, sample.sample_rows(decoder, prompts, 9, **settings, together=16))
    for row in (3, 67):
        alone = decoder.generate(
            prompts[row : row + 1], max_new_tokens=8, mode="autoregressive", do_sample=True, top_k=5, seed=[140 + row],
            eos_token_id=[],
        )  # fmt: skip
        assert torch.equal(alone[0], rows[row])


def test_sampling_ends_when_its_time_is_over(tmp_path, stream):
    """With the shard that was begun, one at least; shards that are there are all read."""
    decoder, reports = decoder_of(tiny_model(spread=0.5)), []

    def shards(**options):
        return list(sample.sample_shards(decoder, 480, 1.0, tmp_path, stream, batch=8, length=20, **options))

    whole = shards(seconds=1e-9, report=reports.append)
    assert len(whole) == 1 and [values["step"] for values in reports] == [1]
    assert len(shards()) == 3 and len(shards(seconds=1e-9)) == 3


def test_a_quarter_of_the_prompts_starts_a_text():
    corpus = torch.arange(1, 1001)
    corpus[500] = 0  # the end of the only text
    prompts = sample.prompt_rows(corpus, 8, 6, 0, seed=3)
    length = prompts.shape[1]
    assert (prompts[:2] == corpus[500 : 500 + length]).all()
    assert not (prompts[2:, 0] == 0).any()
    assert torch.equal(prompts[2:], sample.prompt_rows(corpus, 8, 6, None, seed=3)[2:])


def test_shards_take_their_temperatures_in_turn(tmp_path, stream):
    """And each has a seed of its own."""
    shards = list(
        sample.sample_shards(decoder_of(tiny_model(spread=0.5)), 480, [1.0, 0.5], tmp_path, stream, batch=8, length=20)
    )
    told = []
    for path in sorted(tmp_path.iterdir()):
        with safe_open(path, "pt") as file:
            told.append(json.loads(file.metadata()["settings"]))
    assert [settings["temperature"] for settings in told] == [1.0, 0.5, 1.0]
    assert len({settings["seed"] for settings in told}) == 3 and not torch.equal(shards[0], shards[2])


def test_shards_resume_and_depend_on_their_index_alone(tmp_path, stream):
    decoder = decoder_of(tiny_model(spread=0.5))

    def shards(folder, tokens=400, **options):
        return list(sample.sample_shards(decoder, tokens, [1.0, 0.1], folder, stream, batch=8, length=20, **options))

    reports = []
    whole = shards(tmp_path / "whole", longest_prompt=4, report=reports.append)
    assert [rows.shape for rows in whole] == [(8, 20)] * 3
    assert [values["step"] for values in reports] == [1, 2, 3]
    shards(tmp_path / "parts", tokens=100, longest_prompt=4)
    reports.clear()
    resumed = shards(tmp_path / "parts", longest_prompt=4, report=reports.append)
    assert [values["step"] for values in reports] == [2, 3]
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, sample.load_shards(tmp_path / "parts", VOCAB), strict=True))
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match="was sampled with"):
        shards(tmp_path / "parts", longest_prompt=4, seed=1)


def test_samples_follow_the_models_distribution():
    model = tiny_model(spread=0.2)
    prompts = torch.full((6_000, 1), 5)
    rows = sample.sample_rows(decoder_of(model), prompts, 3, temperature=0.7, seed=0)
    with torch.no_grad():
        first = torch.softmax(model(prompts[:1]).logits[0, -1] / 0.7, -1)
        token = int(first.argmax())
        second = torch.softmax(model(torch.tensor([[5, token]])).logits[0, -1] / 0.7, -1)
    for drawn, wanted in ((rows[:, 1], first), (rows[rows[:, 1] == token, 2], second)):
        expected = wanted * len(drawn)
        counts = torch.bincount(drawn, minlength=VOCAB)
        common = expected > 5
        statistic = ((counts - expected) ** 2 / expected)[common].sum()
        assert statistic < VOCAB + 6 * math.sqrt(2 * VOCAB)  # chi squared, six standard deviations
    assert (rows[:, 1] == 0).any()  # the end of text does not end a row


def test_samples_of_the_top_k():
    model = tiny_model(spread=0.2)
    prompts = torch.full((5000, 1), 5)
    rows = sample.sample_rows(decoder_of(model), prompts, 2, temperature=2.0, seed=0, top_k=3)
    with torch.no_grad():
        best, tokens = torch.softmax(model(prompts[:1]).logits[0, -1] / 2.0, -1).topk(3)
    counts = torch.bincount(rows[:, 1], minlength=VOCAB)
    assert counts[tokens].sum() == 5000
    expected = best / best.sum() * 5000
    assert ((counts[tokens] - expected) ** 2 / expected).sum() < 20  # two degrees of freedom: one in 20,000


def test_a_cut_keeps_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert sample.cut(logits, 2).isfinite().tolist() == [[False, True, True, True, False]]
    assert sample.cut(logits, None) is logits and sample.cut(logits, 9) is logits


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_wanted": 0},
        {"temperature": 0.0},
        {"temperature": []},
        {"temperature": math.nan},
        {"length": 33},
        {"batch": 0},
        {"longest_prompt": 0},
        {"top_k": 0},
        {"longest_prompt": 20},
        {"corpus": torch.zeros(3, dtype=torch.long)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_sampling_settings_that_cannot_be(tmp_path, stream, settings):
    given = {"tokens_wanted": 10, "temperature": 1.0, "folder": tmp_path, "corpus": stream, "batch": 2, "length": 20}
    with pytest.raises(ValueError):
        sample.sample_shards(decoder_of(tiny_model()), **{**given, **settings})  # before anything is read from it


def test_damaged_shards(tmp_path):
    with pytest.raises(ValueError, match="no shards"):
        sample.load_shards(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    for tensors in ({"tokens": torch.zeros(2, 3)}, {"other": torch.zeros(2, 3).int()}):
        save_file(tensors, path)
        with pytest.raises(ValueError, match="int32"):
            list(sample.load_shards(tmp_path))
    save_file({"tokens": torch.full((2, 3), VOCAB).int()}, path)
    with pytest.raises(ValueError, match="outside"):
        list(sample.load_shards(tmp_path, VOCAB))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged"):
        list(sample.load_shards(tmp_path))


# ---- distillation


def test_distillation_raises_agreement(tmp_path, stream):
    target, draft = tiny_model(seed=1, spread=0.4), tiny_model(seed=2, spread=0.1)
    blocks = heldout_blocks(stream[:400], 16)
    before = distil.acceptance(target, draft, blocks)
    config = FitConfig(tokens=150 * 8 * 16, batch=8, block=16, learning_rate=2e-2)
    weights = [parameter.clone() for parameter in target.parameters()]
    fit(
        draft,
        config,
        tmp_path,
        lambda step: distil.mixed_blocks(stream, stream.flip(0), 0.5, config, step),
        distil.distillation_loss(target),
        lambda values: None,
        teacher=target,
    )
    after = distil.acceptance(target, draft, blocks)
    assert after["agreement"] > before["agreement"] + 0.3
    assert after["overlap"] > before["overlap"] + 0.2
    assert after["kl"] < before["kl"] / 2
    assert all(torch.equal(a, b) for a, b in zip(weights, target.parameters(), strict=True))


def _kept(p: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """The distribution p [V] of its top_k tokens alone."""
    kept = p.topk(top_k or len(p))
    return torch.zeros_like(p).index_put_((kept.indices,), kept.values / kept.values.sum())


@pytest.mark.parametrize("top_k", [None, 4])
def test_distillation_loss_by_hand(stream, top_k):
    target, draft, blocks = tiny_model(1, spread=0.4), tiny_model(2, spread=0.4), stream[:34].view(2, 17)
    found = distil.distillation_loss(target, 0.5, top_k)(draft, blocks).item()
    wanted = 0.0
    with torch.no_grad():
        logits = (model(blocks[:, :-1]).logits.flatten(0, 1) for model in (target, draft))
        for theirs, own in zip(*logits, strict=True):
            p, q = _kept(torch.softmax(theirs, -1), top_k), torch.softmax(own, -1)
            wanted += torch.special.xlogy(p, p / q).sum().item() + 0.25 * (p - q).abs().sum().item()
    assert found == pytest.approx(wanted / 32, rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 4])
def test_loss_of_choices_under_the_noise_by_hand(stream, top_k, monkeypatch):
    """Of the token that the target chooses under each position's noise, the log-probability of softmax(log q + g)."""
    target, draft, blocks = tiny_model(1, spread=0.4), tiny_model(2, spread=0.4), stream[:34].view(2, 17)
    noise = distil.gumbel_like(torch.empty(32, VOCAB))
    monkeypatch.setattr(distil, "gumbel_like", lambda like: noise.reshape(like.shape))
    plain, found = (distil.distillation_loss(target, 0.5, top_k, weight)(draft, blocks).item() for weight in (0.0, 3.0))
    wanted = 0.0
    with torch.no_grad():
        logits = (model(blocks[:, :-1]).logits.flatten(0, 1) for model in (target, draft))
        for theirs, own, gumbel in zip(*logits, noise, strict=True):
            p = _kept(torch.softmax(theirs, -1), top_k)
            choice = max((p[token].log().item() + gumbel[token].item(), token) for token in range(len(p)))[1]
            scores = torch.softmax(own, -1) * gumbel.exp()
            wanted -= (scores[choice] / scores.sum()).log().item()
    assert found - plain == pytest.approx(3.0 * wanted / 32, rel=1e-4)


def test_noise_is_gumbels():
    """Its distribution is exp(-exp(-x)): Kolmogorov and Smirnov's distance at 1e-6; and it is always finite."""
    torch.manual_seed(3)
    drawn = distil.gumbel_like(torch.empty(400, 500)).flatten().double().sort().values
    ranks = torch.arange(1, len(drawn) + 1) / len(drawn)
    assert (torch.exp(-torch.exp(-drawn)) - ranks).abs().max() < 2.7 / len(drawn) ** 0.5
    assert drawn.isfinite().all() and distil.gumbel_like(torch.empty(8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("top_k", [None, 4])
def test_acceptance_by_hand(stream, top_k):
    target, draft, blocks = tiny_model(1, spread=0.4), tiny_model(2, spread=0.4), stream[:34].view(2, 17)
    same = distil.acceptance(target, target, blocks)
    assert same["agreement"] == same["top4"] == 1
    assert same["overlap"] == pytest.approx(1, abs=1e-5) and same["kl"] == pytest.approx(0, abs=1e-5)
    sums = torch.zeros(4)
    for row in blocks[:, :-1]:
        for position in range(16):
            with torch.no_grad():
                p = torch.softmax(target(row[None, : position + 1]).logits[0, -1], -1)
                q = torch.softmax(draft(row[None, : position + 1]).logits[0, -1], -1)
            best = int(p.argmax())
            p, kept = _kept(p, top_k), _kept(q, top_k)
            kl = torch.special.xlogy(p, p / q).sum()
            overlap = (p - kept).clamp(max=0).sum() + 1
            sums += torch.tensor([int(q.argmax()) == best, overlap, best in q.topk(4)[1], kl])
    found = distil.acceptance(target, draft, blocks, top_k)
    assert list(found.values()) == pytest.approx((sums / 32).tolist(), rel=1e-4)


def test_mixed_blocks():
    config = FitConfig(tokens=64, batch=4, block=8)
    real, own = torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long)
    assert distil.mixed_blocks(real, own, 0.5, config, 0).sum(1).tolist() == [9, 9, 0, 0]
    assert distil.mixed_blocks(real, own, 0.0, config, 0).sum() == 0
    counting = torch.arange(500)
    assert torch.equal(*(distil.mixed_blocks(counting, counting, 0.5, config, 3) for _ in range(2)))


# ---- the recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of small Python files, enough for some to be held out."""
    folder = tmp_path_factory.mktemp("source")
    for index in range(60):
        lines = (f"    def method_{index}_{i}(self, value):\n        return self.x{i} + value\n" for i in range(8))
        (folder / f"module_{index}.py").write_text(f"class Thing{index}:\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(source):
    fits = {"batch": 8, "block": 32, "tokens": 40 * 8 * 32}
    return recipe.preset(
        "tiny",
        sources=(str(source),),
        vocab_size=300,
        target_fit=FitConfig(**fits, learning_rate=1e-2),
        draft_fit=FitConfig(**fits, learning_rate=2e-2, seed=1, checkpoint_seconds=0.0),
        pretraining_fit=FitConfig(**fits, learning_rate=2e-2, seed=1),
        evaluate_every=20,
        device="cpu",
    )


def run_recipe(config, out, stop_at=None):
    """Runs the recipe; returns what it reported. stop_at: (stage, step) to be killed at."""
    seen = []

    def progress(values):
        seen.append(values)
        if (values["stage"], values.get("step")) == stop_at:
            raise Killed

    try:
        folder = recipe.train(config, out, progress)
        assert folder == out / "assets"
    except Killed:
        assert stop_at is not None
    return seen


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run_recipe(config, out)


def tensors_of(folder):
    paths = folder.rglob("*.safetensors")
    return {(path.relative_to(folder), key): value for path in paths for key, value in load_file(path).items()}


def test_recipe_reports_every_stage(trained):
    _, seen = trained
    assert list(dict.fromkeys(values["stage"] for values in seen)) == list(recipe.STAGES)
    last = {values["stage"]: values for values in seen}
    assert all(values["step"] == values["steps"] for values in last.values())
    losses = [values["heldout_loss"] for values in seen if values["stage"] == "target" and "heldout_loss" in values]
    assert losses[-1] < losses[0] and last["target"]["heldout_bpb"] > 0
    assert {"agreement", "overlap", "top4", "heldout_loss", "heldout_bpb"} <= last["draft"].keys()


def test_exported_models_load_and_generate(trained, config):
    assets = trained[0] / "assets"
    tokenizer = AutoTokenizer.from_pretrained(assets / "target")
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0 and tokenizer.model_max_length == 64
    text = "class Thing1:\n    def é(self): return '→'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer("class Thing", return_tensors="pt")
    for name in ("target", "draft"):
        model = GPT2LMHeadModel.from_pretrained(assets / name, dtype=torch.float32)
        assert (model.config.bos_token_id, model.config.eos_token_id, model.config.resid_pdrop) == (0, 0, 0.0)
        assert model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, pad_token_id=0).shape[1] > 8
        weights = load_file(assets / name / "model.safetensors")
        assert all(weight.dtype == torch.float16 for weight in weights.values())
    assert KatzTable.load(assets / "ngram.safetensors", vocab_size=300).successors == config.ngram_successors


def test_model_card(trained, config):
    text = (trained[0] / "assets" / "README.md").read_text()
    for wanted in ("bits per byte", "stagedspec train", torch.__version__, "temperature 1.5", "Float16", "held out"):
        assert wanted in text
    assert str(trained[0]) not in text and str(config.sources[0]) not in text  # no paths of this machine
    for name in ("target", "draft"):
        sampled = sum(rows.numel() for rows in sample.load_shards(trained[0] / f"{name}-samples"))
        assert f"| {name}-samples | {sampled} |" in text and f"{sampled:,} tokens" in text
    assert "not recorded" not in text


def test_a_second_run_does_nothing(trained, config):
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*.safetensors")}
    seen = run_recipe(config, trained[0])
    assert seen == [{"stage": stage, "skipped": True} for stage in recipe.STAGES]
    assert before == {path: path.stat().st_mtime_ns for path in trained[0].rglob("*.safetensors")}


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_the_same(trained, config, tmp_path):
    for stop in (
        ("corpus", 0),
        ("target", 20),
        ("target-samples", 1),
        ("draft", 17),
        ("draft", 40),
        ("ngram", 0),
        ("assets", 0),
    ):
        assert run_recipe(config, tmp_path, stop)[-1]["stage"] == stop[0]
    run_recipe(config, tmp_path)
    one, other = tensors_of(trained[0]), tensors_of(tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_recipe_takes_over_a_folder_with_corpus_and_target(trained, config, tmp_path):
    """A folder that other code of this package made: corpus, tokenizer, a target's checkpoint; no train.json."""
    for path in ("corpus.safetensors", "tokenizer/tokenizer.json", "target/checkpoint.safetensors", "target.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((trained[0] / path).read_bytes())
    name = "tokenizer/tokenizer_config.json"
    (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    seen = run_recipe(config, tmp_path, ("target-samples", 1))
    assert seen[:2] == [{"stage": "corpus", "skipped": True}, {"stage": "target", "skipped": True}]
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match="vocabulary of 300"):
        recipe.train(recipe.preset("tiny"), tmp_path)


def test_recipe_refuses_bad_input_before_any_work(config, tmp_path, trained):
    with pytest.raises(ValueError, match="nowhere"):
        recipe.train(replace(config, sources=("nowhere_to_be_found",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="draft_samples"):
        recipe.train(replace(config, draft_samples=9_000), trained[0])
    with pytest.raises(ValueError, match="device"):
        recipe.train(replace(config, device="abacus"), tmp_path / "run")
    with pytest.raises(ValueError, match="unknown preset"):
        recipe.preset("huge")
    with pytest.raises(ValueError, match="unknown settings: colour"):
        recipe.preset("tiny", colour=1)


def test_recipe_refuses_too_little_source(config, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    settings = replace(config, sources=(str(source),))
    with pytest.raises(ValueError, match="too little Python source"):
        recipe.train(settings, tmp_path / "run")
    for index in range(2):
        (source / f"{index}.py").write_text("".join(f"word_{index}_{i} = {i}\n" for i in range(15)))
    with pytest.raises(ValueError, match="vocabulary of"):
        recipe.train(replace(settings, vocab_size=4000), tmp_path / "run")
    block = FitConfig(tokens=4000, batch=1, block=512)
    settings = replace(settings, n_positions=512, target_fit=block, draft_fit=block, vocab_size=257)
    with pytest.raises(ValueError, match="fewer than one block"):
        recipe.train(settings, tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"sources": ()},
        {"vocab_size": 256},
        {"n_positions": 16},
        {"sample_share": 1.5},
        {"sample_share": math.nan},
        {"draft_temperature": 0.0},
        {"target_temperatures": ()},
        {"target_length": 65},
        {"longest_prompt": 64},
        {"target_micro_batch": 3},
        {"draft_micro_batch": 4, "pretraining_fit": recipe.FitConfig(tokens=100, batch=6, block=32)},
        {"ngram_successors": 0},
        {"target_samples": 5},
        {"target_top_k": 0},
        {"draft_sample_seconds": 0.0},
        {"sampled_together": 65},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_recipe_settings_that_cannot_be(settings):
    with pytest.raises(ValueError):
        recipe.preset("tiny", **settings)


def test_a_preset_that_needs_less_memory_is_the_preset():
    assert recipe.preset("tiny", sampled_together=2, draft_micro_batch=4, device="cpu") == recipe.PRESETS["tiny"]


def test_shapes_that_cannot_be():
    for shape in ({"layers": 0}, {"heads": 3}, {"inner": 0}):
        with pytest.raises(ValueError, match=next(iter(shape))):
            recipe.Shape(**{"layers": 1, "width": 16, "heads": 2, **shape})


@pytest.mark.parametrize("name", ["embedded", "embedded-cpu", "gpt2-large"])
def test_presets_have_a_draft_15_to_20_times_smaller(name):
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        target, draft = (
            sum(p.numel() for p in recipe.new_model(config, shape).parameters())
            for shape in (config.target, config.draft)
        )
    assert 15 <= target / draft <= 20
    assert json.loads(json.dumps(asdict(config)))["device"] == "auto"


def test_corpus_is_decided_by_content(source, tmp_path):
    copy = tmp_path / "renamed"
    copy.mkdir()
    for index, path in enumerate(sorted(source.glob("*.py"), reverse=True)):
        (copy / f"{index}.py").write_bytes(path.read_bytes())
    (copy / "tests").mkdir()
    (copy / "tests" / "left_out.py").write_text("x = 1\n" * 100)
    (copy / "binary.py").write_bytes(b"\xff\xfe" * 200)
    assert corpus_module.read_documents([str(copy)]) == corpus_module.read_documents([str(source)])
    train, heldout = corpus_module.read_documents([str(source)])
    assert len(train) + len(heldout) == 60 and not set(train) & set(heldout)


def test_folders_above_a_source_do_not_count(tmp_path):
    folder = tmp_path / "tests" / "code"
    folder.mkdir(parents=True)
    for index in range(4):
        (folder / f"{index}.py").write_text(f"number = {index}\n" * 30)
    train, heldout = corpus_module.read_documents([str(folder)])
    assert len(train) + len(heldout) == 4


def test_bytes_of_the_held_out_part(tmp_path):
    """Each document's UTF-8 bytes, and one for the token that ends it."""
    for index in range(4):
        (tmp_path / f"{index}.py").write_text(f"# Grüße {index}\n" * 30, encoding="utf-8")
    corpus, tokenizer = corpus_module.build([str(tmp_path)], 300)
    texts = tokenizer.decode(corpus.heldout).split(corpus_module.END_OF_TEXT)[:-1]
    assert corpus.heldout_bytes == sum(len(text.encode()) + 1 for text in texts) > len("".join(texts)) + len(texts)


def test_missing_sources_are_all_named(tmp_path):
    config = recipe.preset("tiny", sources=("json", "no_such_package", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"'no_such_package'.*nowhere.*install"):
        recipe.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_corpus(tmp_path):
    path = tmp_path / "corpus.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        corpus_module.Corpus.load(path)


def test_sources_are_named_with_version_and_licence(source):
    assert "PSF-2.0" in source_line("stdlib") and "PSF-2.0" in source_line("json")
    assert source_line("rich").startswith("rich 1") and "MIT" in source_line("rich")
    assert str(source.parent) not in source_line(str(source))
