"""The paper's recipe as one resumable run: corpus, target, distilled draft, n-gram table, export.

Spector & Re, arXiv 2308.04623, section 4: a target, a draft 15 to 20 times smaller trained on the same data, and a
Katz trigram fitted on text sampled from the draft at temperature 1.5. Here the draft is also distilled on the target's
text and logits. Stages, in order, and what each leaves in the run's folder:

    corpus          corpus.safetensors, tokenizer/
    target          target/checkpoint.safetensors
    target-samples  target-samples/shard-*.safetensors
    pretraining     pretraining/checkpoint.safetensors: of the draft, on the corpus alone; not in every recipe
    draft           draft/checkpoint.safetensors
    draft-samples   draft-samples/shard-*.safetensors
    ngram           ngram.safetensors
    assets          assets/: what decoding loads

A stage whose result exists is not run again. A killed stage continues where it stopped. `<stage>.jsonl` is its log.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from stagedspec.decoder import Decoder
from stagedspec.decoding.limits import MAX_PLAIN_BATCH
from stagedspec.devices import resolve_device
from stagedspec.kernels.common.files import replacing, write_text
from stagedspec.models.loading import no_bars
from stagedspec.models.ngram_fit import fit_table
from stagedspec.models.shapes import SIZES, Shape
from stagedspec.training import card, distil, sample
from stagedspec.training.corpus import Corpus, build
from stagedspec.training.fit import (
    FitConfig,
    cross_entropy,
    fit,
    heldout_blocks,
    heldout_loss,
    load_weights,
    sample_blocks,
)
from stagedspec.training.sources import check_sources
from stagedspec.training.state import position_of

STAGES = ("corpus", "target", "target-samples", "pretraining", "draft", "draft-samples", "ngram", "assets")
_MODELS = {"pretraining": "draft"}  # stages that train another model than their name says
Progress = Callable[[dict], None]


# Permissively licensed (PSF, BSD, MIT, Apache) and written by many hands.
_PACKAGES = """
stdlib numpy scipy pandas sklearn skimage sympy mpmath networkx statsmodels patsy matplotlib seaborn xarray
joblib toolz numba llvmlite Cython cupy h5py torch torchvision torch_geometric lightning accelerate peft timm
sentence_transformers jax flax optax chex equinox diffrax lineax optimistix numpyro botorch gpytorch
linear_operator einops onnx tensorboard fsspec huggingface_hub aiohttp requests urllib3 werkzeug jinja2 click
typer rich pygments markdown imageio PIL yaml attr setuptools pip wheel _pytest coverage psutil humanize
formulaic sacrebleu
"""
EMBEDDED_SOURCES = tuple(_PACKAGES.split())
_TARGET_FIT = FitConfig(tokens=500_000_000, batch=64, block=512, learning_rate=3e-3, checkpoint_seconds=60)
_DRAFT_FIT = FitConfig(tokens=1_000_000_000, batch=64, block=512, learning_rate=6e-3, seed=1, checkpoint_seconds=60)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. The defaults train the embedded models on one GPU.

    sources:            what sources.source_folder takes: "stdlib", installed packages, folders.
    target, draft:      sizes; target_fit, draft_fit: their training.
    pretraining_fit:    the draft's training on the corpus alone, before it is distilled; None: it is only distilled.
    sample_share:       part of the draft's training batches that is the target's own text.
    overlap_weight, choice_weight: in the draft's loss, see distil.distillation_loss.
    target_top_k:       top-k of the target's distribution when it is sampled and when it teaches; None: all tokens.
    target_samples:     tokens sampled from the target, at target_temperatures in turn; a shard is target_rows x
                        target_length tokens.
    draft_samples:      tokens sampled from the draft for the n-gram, at draft_temperature; a shard is draft_rows x
                        draft_length tokens.
    target_sample_seconds, draft_sample_seconds: sampling ends after so long, with fewer tokens.
    sampled_together:   rows of a batch of sampling, at most 64; lower it when memory runs out.
    longest_prompt:     sampled rows begin with 1 to this many tokens of the corpus.
    ngram_contexts, ngram_successors: size of the table.
    target_micro_batch, draft_micro_batch: blocks a pass (memory), the whole batch by default.
    evaluate_every:     steps between two held-out evaluations.
    compiled:           compile a model's layers when it is trained on a GPU.
    device:             "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<n>". A run may continue on another one.

    Comparisons leave out what changes nothing but rounding and memory (`compare=False`): a run may continue with other
    values of these.

    Raises ValueError for invalid settings.
    """

    sources: tuple[str, ...] = EMBEDDED_SOURCES
    vocab_size: int = SIZES["target"].vocab
    n_positions: int = SIZES["target"].positions
    target: Shape = SIZES["target"].without_vocabulary
    draft: Shape = SIZES["draft"].without_vocabulary
    target_fit: FitConfig = _TARGET_FIT
    draft_fit: FitConfig = _DRAFT_FIT
    pretraining_fit: FitConfig | None = None
    sample_share: float = 0.75
    overlap_weight: float = 6.0
    choice_weight: float = 4.0
    target_top_k: int | None = 50
    target_samples: int = 16_777_216
    target_temperatures: tuple[float, ...] = (1.0, 1.0, 0.5, 0.1)
    target_rows: int = 4096
    target_length: int = 256
    draft_samples: int = 8_388_608
    draft_temperature: float = 1.5
    draft_rows: int = 4096
    draft_length: int = 256
    target_sample_seconds: float | None = None
    draft_sample_seconds: float | None = None
    sampled_together: int = field(default=MAX_PLAIN_BATCH, compare=False)
    longest_prompt: int = 64
    ngram_contexts: int = 32_768
    ngram_successors: int = 4
    target_micro_batch: int | None = field(default=None, compare=False)
    draft_micro_batch: int | None = field(default=None, compare=False)
    evaluate_every: int = field(default=2000, compare=False)
    compiled: bool = field(default=True, compare=False)
    seed: int = 0
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError('sources is empty: give "stdlib", an installed package or a folder')
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes, end of text), got {self.vocab_size}")
        positive = "n_positions target_samples target_rows draft_samples draft_rows longest_prompt ngram_contexts"
        for name in (*positive.split(), "ngram_successors", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, model in (("target", "target"), ("draft", "draft"), ("pretraining", "draft")):
            settings, depth = getattr(self, f"{name}_fit"), getattr(self, model).layers
            if settings is None:
                continue
            micro = getattr(self, f"{model}_micro_batch")
            if micro is not None and (micro < 1 or settings.batch % micro):
                raise ValueError(
                    f"{model}_micro_batch must divide the batch of {name}_fit, {settings.batch}, got {micro}"
                )
            if settings.block > self.n_positions:
                raise ValueError(
                    f"{name}_fit.block must be at most n_positions ({self.n_positions}), got {settings.block}"
                )
            if settings.shallow_layers is not None and settings.shallow_layers > depth:
                raise ValueError(
                    f"{name}_fit.shallow_layers must be at most its {depth} layers, got {settings.shallow_layers}"
                )
        for name in ("target", "draft"):
            length = getattr(self, f"{name}_length")
            if not self.longest_prompt < length <= self.n_positions:
                raise ValueError(
                    f"{name}_length must be above longest_prompt ({self.longest_prompt}) and at most n_positions "
                    f"({self.n_positions}), got {length}"
                )
        if not 1 <= self.sampled_together <= MAX_PLAIN_BATCH:
            raise ValueError(f"sampled_together must be from 1 to {MAX_PLAIN_BATCH}, got {self.sampled_together}")
        if not 0 <= self.sample_share <= 1:
            raise ValueError(f"sample_share must be from 0 to 1, got {self.sample_share}")
        if self.target_top_k is not None and self.target_top_k < 1:
            raise ValueError(f"target_top_k must be at least 1 or None, got {self.target_top_k}")
        for name in ("overlap_weight", "choice_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        for name in ("target_sample_seconds", "draft_sample_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number or None, got {value}")
        temperatures = (*self.target_temperatures, self.draft_temperature)
        if not self.target_temperatures or not all(0 < t < math.inf for t in temperatures):
            raise ValueError(f"temperatures must be positive numbers, got {temperatures}")
        # Whole shards are sampled: the last one may go beyond what was asked for.
        if self.target_samples < self.draft_fit.block + 1:
            raise ValueError(f"target_samples must exceed a block of {self.draft_fit.block}, got {self.target_samples}")


# For 20 minutes of one H200. What each setting brought: stagedspec/README.md.
_LARGE = TrainConfig(
    vocab_size=16_384,
    n_positions=1024,
    target=SIZES["L"].without_vocabulary,  # 731M parameters with this vocabulary
    draft=Shape(layers=2, width=1024, heads=16),  # 43M: 17 times smaller
    target_fit=FitConfig(
        tokens=80_000_000,
        seconds=600,
        batch=32,
        block=1024,
        learning_rate=3e-3,
        optimizer="muon",
        shallow_layers=6,
        checkpoint_seconds=240,
    ),
    draft_fit=FitConfig(
        tokens=40_000_000, seconds=190, batch=32, block=1024, learning_rate=3e-3, optimizer="muon", seed=1
    ),
    pretraining_fit=FitConfig(
        tokens=100_000_000, seconds=90, batch=64, block=1024, learning_rate=3e-3, optimizer="muon", seed=1
    ),
    sample_share=0.25,
    target_samples=2_000_000,
    target_rows=256,
    target_length=512,
    draft_samples=4_000_000,
    draft_rows=1024,
    draft_length=256,
    longest_prompt=16,
    ngram_contexts=1_048_576,
    ngram_successors=8,
    evaluate_every=200,
)

_TINY = TrainConfig(
    sources=("json", "asyncio", "logging"),
    vocab_size=384,
    n_positions=64,
    target=Shape(layers=2, width=64, heads=2),
    draft=Shape(layers=1, width=16, heads=1, inner=32),
    target_fit=FitConfig(tokens=40_000, batch=8, block=32, learning_rate=1e-2),
    draft_fit=FitConfig(tokens=40_000, batch=8, block=32, learning_rate=2e-2, seed=1),
    target_samples=4_000,
    target_rows=32,
    target_length=64,
    draft_samples=8_000,
    draft_rows=64,
    draft_length=64,
    longest_prompt=8,
    ngram_contexts=1024,
    evaluate_every=50,
)

# The embedded models' sizes with what a CPU can do in hours: a smaller budget, and no source to install first.
_CPU = TrainConfig(
    sources=("stdlib",),
    target_fit=FitConfig(tokens=4_400_000, batch=4, block=512, learning_rate=1.5e-3),
    draft_fit=FitConfig(tokens=1_600_000, batch=2, block=512, learning_rate=4e-3, seed=1),
    sample_share=0.5,
    target_samples=131_072,
    target_temperatures=(1.0, 0.25),
    target_rows=64,
    target_length=128,
    draft_samples=1_500_000,
    draft_rows=256,
    draft_length=128,
    longest_prompt=8,
    evaluate_every=200,
)

PRESETS: dict[str, TrainConfig] = {
    "embedded": TrainConfig(),
    "embedded-cpu": _CPU,
    "tiny": _TINY,
    "gpt2-large": _LARGE,
}


def preset(name: str, **settings: Any) -> TrainConfig:
    """A preset with some settings replaced. Raises ValueError for an unknown preset or setting."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    unknown = settings.keys() - asdict(PRESETS[name]).keys()
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}; TrainConfig lists what there is")
    return replace(PRESETS[name], **settings)


def train(config: TrainConfig, out: Path, progress: Progress = lambda values: None) -> Path:
    """Runs the recipe in the folder `out` from where an earlier run stopped; returns the folder of the exported models.

    progress: called with dicts. They hold `stage` (one of STAGES); `skipped` for a stage that was done before; else
    `step` and `steps`, and if they are known loss, heldout_loss, heldout_bpb (bits per byte), agreement, overlap, top4
    (see distil.acceptance), tokens_per_second, tflops, seconds. A stage ends with step == steps.

    Raises ValueError before any work if a source is missing or `out` belongs to other settings.
    """
    return _Run(config, Path(out).expanduser(), progress).run()


class _Run:
    def __init__(self, config: TrainConfig, out: Path, progress: Progress):
        self.config, self.out, self.progress = config, out, progress
        self.device = resolve_device(config.device)

    def run(self) -> Path:
        if not self._corpus_done():
            check_sources(self.config.sources)
        self.out.mkdir(parents=True, exist_ok=True)
        self._claim()
        stages = (
            ("corpus", self._corpus_done, self._make_corpus),
            ("target", lambda: self._fitted("target"), self._fit_target),
            ("target-samples", lambda: self._done("target-samples"), self._sample_target),
            ("pretraining", lambda: self._fitted("pretraining"), self._pretrain_draft),
            ("draft", lambda: self._fitted("draft"), self._fit_draft),
            ("draft-samples", lambda: self._done("draft-samples"), self._sample_draft),
            ("ngram", (self.out / "ngram.safetensors").exists, self._fit_ngram),
            ("assets", (self.out / "assets" / "README.md").exists, self._export),
        )
        for name, done, work in stages:
            if name not in stages_of(self.config):
                continue
            if done():
                self.progress({"stage": name, "skipped": True})
                continue
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as log:
                work(self._reporter(name, log))
        return self.out / "assets"

    # ---- stages

    def _make_corpus(self, report: Progress) -> None:
        start = time.perf_counter()
        report({"step": 0, "steps": 1})
        corpus, tokenizer = build(list(self.config.sources), self.config.vocab_size)
        if len(tokenizer) != self.config.vocab_size:
            raise ValueError(
                f"the source yields a vocabulary of {len(tokenizer)} tokens only, not {self.config.vocab_size}: "
                "add source or lower vocab_size"
            )
        self._check(corpus)
        tokenizer.model_max_length = self.config.n_positions
        tokenizer.save_pretrained(self.out / "tokenizer")
        with replacing(self.out / "corpus.safetensors") as part:
            corpus.save(part)
        seconds = time.perf_counter() - start
        report({
            "step": 1,
            "steps": 1,
            "train_tokens": len(corpus.train),
            "heldout_tokens": len(corpus.heldout),
            "sources": [card.source_line(source) for source in self.config.sources],
            "seconds": seconds,
        })  # fmt: skip

    def _fit_target(self, report: Progress) -> None:
        self._fit("target", self.config.target, self.config.target_fit, self.config.target_micro_batch, report)

    def _pretrain_draft(self, report: Progress) -> None:
        settings = cast(FitConfig, self.config.pretraining_fit)
        self._fit("pretraining", self.config.draft, settings, self.config.draft_micro_batch, report)

    def _fit(self, stage: str, shape: Shape, settings: FitConfig, micro_batch: int | None, report: Progress) -> None:
        """Trains a model on the corpus."""
        corpus, config = self._corpus(), self.config
        model = _placed(new_model(config, shape), self.device)
        fit(
            model,
            settings,
            self.out / stage,
            lambda step: sample_blocks(corpus.train, settings, step),
            cross_entropy,
            report,
            lambda: heldout(model, corpus, settings.block),
            config.evaluate_every,
            micro_batch,
            compiled=config.compiled,
        )

    def _sample_target(self, report: Progress) -> None:
        config = self.config
        shards = sample.sample_shards(
            self._for_sampling("target"),
            config.target_samples,
            config.target_temperatures,
            self.out / "target-samples",
            self._corpus().train,
            config.target_rows,
            config.target_length,
            config.longest_prompt,
            config.seed + 1,
            report,
            config.target_top_k,
            config.target_sample_seconds or math.inf,
            config.sampled_together,
        )
        self._finish("target-samples", shards, report)

    def _fit_draft(self, report: Progress) -> None:
        corpus, config = self._corpus(), self.config
        target, draft = self._trained("target"), _placed(new_model(self.config, config.draft), self.device)
        if config.pretraining_fit is not None:
            load_weights(draft, self.out / "pretraining", config.pretraining_fit)
        samples = torch.cat([rows.flatten() for rows in sample.load_shards(self.out / "target-samples")])
        blocks = heldout_blocks(corpus.heldout, config.draft_fit.block, limit=16)
        fit(
            draft,
            config.draft_fit,
            self.out / "draft",
            lambda step: distil.mixed_blocks(corpus.train, samples, config.sample_share, config.draft_fit, step),
            distil.distillation_loss(
                target,
                config.overlap_weight,
                config.target_top_k,
                config.choice_weight,
                compiled=config.compiled and self.device.type == "cuda",
            ),
            report,
            lambda: (
                distil.acceptance(target, draft, blocks, config.target_top_k)
                | heldout(draft, corpus, config.draft_fit.block)
            ),
            config.evaluate_every,
            config.draft_micro_batch,
            teacher=target,
            compiled=config.compiled,
        )

    def _sample_draft(self, report: Progress) -> None:
        config = self.config
        shards = sample.sample_shards(
            self._for_sampling("draft"),
            config.draft_samples,
            config.draft_temperature,
            self.out / "draft-samples",
            self._corpus().train,
            config.draft_rows,
            config.draft_length,
            config.longest_prompt,
            config.seed + 2,
            report,
            seconds=config.draft_sample_seconds or math.inf,
            together=config.sampled_together,
        )
        self._finish("draft-samples", shards, report)

    def _fit_ngram(self, report: Progress) -> None:
        start = time.perf_counter()
        report({"step": 0, "steps": 1})
        table = fit_table(
            sample.load_shards(self.out / "draft-samples", self.config.vocab_size),
            self.config.vocab_size,
            successors=self.config.ngram_successors,
            max_contexts=self.config.ngram_contexts,
            separator=0,
        )
        table.save(self.out / "ngram.safetensors")
        report({"step": 1, "steps": 1, "seconds": time.perf_counter() - start})

    def _export(self, report: Progress) -> None:
        start = time.perf_counter()
        report({"step": 0, "steps": 1})
        assets = self.out / "assets"
        for name in ("target", "draft"):
            with no_bars():
                self._trained(name).cpu().half().save_pretrained(assets / name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.out / "tokenizer")
        tokenizer.model_max_length = self.config.n_positions
        tokenizer.save_pretrained(assets / "target")
        (assets / "ngram.safetensors").write_bytes((self.out / "ngram.safetensors").read_bytes())
        # What is reported is what is shipped: the half-precision weights, read back.
        with no_bars():
            target, draft = (
                _placed(GPT2LMHeadModel.from_pretrained(assets / name, dtype=torch.float32), self.device)
                for name in ("target", "draft")
            )
        corpus, block = self._corpus(), self.config.target_fit.block
        measured = {
            "target": {"parameters": target.num_parameters(), **heldout(target, corpus, block, limit=128)},
            "draft": {"parameters": draft.num_parameters(), **heldout(draft, corpus, block, limit=128)},
            "acceptance": distil.acceptance(
                target, draft, heldout_blocks(corpus.heldout, block, limit=64), self.config.target_top_k
            ),
        }
        made_as = next((name for name, config in PRESETS.items() if config == self.config), None)
        text = card.model_card(asdict(self.config), made_as, self.out, stages_of(self.config)[:-1], measured)
        for path in assets.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors are written for the owner alone; these are installed for everybody
        with replacing(assets / "README.md") as part:  # last: the card marks the export as done
            part.write_text(text, encoding="utf-8")
            part.chmod(0o644)
        report({"step": 1, "steps": 1, **measured, "seconds": time.perf_counter() - start})

    # ---- what the stages share

    def _claim(self) -> None:
        """Checks that the folder, if there is a corpus in it, was made with the same settings, and notes them in it."""
        path = self.out / "train.json"
        wanted = json.loads(json.dumps(asdict(self.config)))
        free = {setting.name for setting in fields(TrainConfig) if not setting.compare}
        if path.exists() and self._corpus_done():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is damaged ({error}); remove the folder to train again") from error
            different = sorted(key for key in wanted.keys() - free if stored.get(key) != wanted[key])
            if different:
                raise ValueError(
                    f"{self.out} was made with other settings ({', '.join(different)}): use them, or another folder"
                )
        elif self._corpus_done():
            size = len(PreTrainedTokenizerFast.from_pretrained(self.out / "tokenizer"))
            if size != self.config.vocab_size:
                raise ValueError(
                    f"{self.out} has a vocabulary of {size}, not {self.config.vocab_size}: use another folder"
                )
            self._check(self._corpus())
        write_text(path, json.dumps(wanted, indent=1))

    def _check(self, corpus: Corpus) -> None:
        block = max(self.config.target_fit.block, self.config.draft_fit.block)
        for name, tokens in (("training", corpus.train), ("held-out", corpus.heldout)):
            if len(tokens) <= block:
                raise ValueError(
                    f"the {name} part has {len(tokens)} tokens, fewer than one block of {block} + 1: add source"
                )

    def _reporter(self, stage: str, log: IO[str]) -> Progress:
        def report(values: dict) -> None:
            log.write(json.dumps(values) + "\n")
            log.flush()
            self.progress({"stage": stage, **values})

        return report

    def _corpus_done(self) -> bool:
        return (self.out / "corpus.safetensors").exists() and (self.out / "tokenizer" / "tokenizer.json").exists()

    def _fitted(self, name: str) -> bool:
        position = position_of(self.out / name)
        return position.progress == 1 and position.layers == getattr(self.config, _MODELS.get(name, name)).layers

    def _done(self, name: str) -> bool:
        return (self.out / name / "done").exists()

    def _finish(self, name: str, shards: Iterable[torch.Tensor], report: Progress) -> None:
        for _ in shards:
            pass
        (self.out / name / "done").touch()

    def _corpus(self) -> Corpus:
        return Corpus.load(self.out / "corpus.safetensors")

    def _trained(self, name: str) -> GPT2LMHeadModel:
        with self.device:  # its first weights are made there: on a CPU that takes seconds for a large model
            model = new_model(self.config, getattr(self.config, name))
        return load_weights(model, self.out / name, getattr(self.config, f"{name}_fit"))

    def _for_sampling(self, name: str) -> Decoder:
        return Decoder.from_pretrained(self._trained(name), device=self.device)


def stages_of(config: TrainConfig) -> tuple[str, ...]:
    """The stages of a run with these settings."""
    return tuple(stage for stage in STAGES if stage != "pretraining" or config.pretraining_fit is not None)


def new_model(config: TrainConfig, shape: Shape) -> GPT2LMHeadModel:
    """An untrained model of this size, its weights drawn from config.seed."""
    settings = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.inner,
        activation_function=shape.activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(settings)


def _placed(model: Any, device: torch.device) -> GPT2LMHeadModel:
    """The model, moved to a device. Any: the annotations of transformers' `to` lack its self."""
    return model.to(device)


def heldout(model: GPT2LMHeadModel, corpus: Corpus, block: int, limit: int = 32) -> dict[str, float]:
    """Held-out loss in nats a token and in bits a byte of UTF-8."""
    loss = heldout_loss(model, corpus.heldout, block, limit)
    return {"heldout_loss": loss, "heldout_bpb": loss * len(corpus.heldout) / corpus.heldout_bytes / math.log(2)}
