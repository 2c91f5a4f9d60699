"""The resumable training loop of target and draft, which differ only in the loss.

The batch of step i and the noise of its loss depend only on (seed, i), and there is no dropout. So a resumed run sees
the same data as an uninterrupted one; on a CPU, with a budget of tokens, both end bitwise equal.

A budget of seconds in place of tokens: the learning rate follows the time, compiling and evaluations included, so that
a run ends when its time is over and its rate has fallen to its end.

A run may begin with few layers (`FitConfig.shallow_layers`), whose steps are cheaper, and be made deeper later.

What a large model needs to use a GPU's matrix units, and where it is done:
- bf16 products on fp32 master weights (`autocast`), fused AdamW: one read and write of the moments a step.
- a layer is compiled once and used for all, in every depth: seconds, where a whole model takes minutes. Embeddings,
  head and loss are a few percent of a large model's work.
- causal attention without a mask tensor (`causal_attention`), so that the flash kernels apply.
- `micro_batch`: a step of many tokens in parts that fit into memory, gradients added up. The casts of the weights to
  bf16 and the optimizer's traffic cost a few milliseconds each, little beside a micro-batch of 30,000 tokens.
- nothing waits for the GPU within a step: batches are made in pinned memory and copied asynchronously, and the loss
  is read every tenth step.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stagedspec.training import state
from stagedspec.training.state import OPTIMIZERS, Position

FREE = frozenset({"checkpoint_seconds"})  # settings that a resumed run may change
_CAUSAL = "stagedspec_causal"


@dataclass(frozen=True)
class FitConfig:
    """Settings of one training run. A step sees batch * block tokens.

    tokens: the whole budget, unless `seconds` is given, which then is the budget.
    optimizer: "adamw", or "muon" for the matrices of the layers and AdamW for the rest (`state.make_optimizers`).
    learning_rate: the peak; warmup: fraction of the budget; final_learning_rate: fraction of the peak.
    shallow_layers: layers of the model for the first `shallow_share` of the budget, after which they are repeated to
    the model's own depth (`state.deeper`); None: the whole depth from the beginning.
    checkpoint_seconds: time between two checkpoints; a resumed run may change it, and nothing else.
    Raises ValueError for invalid values.
    """

    tokens: int
    batch: int = 8
    block: int = 512
    learning_rate: float = 2e-3
    warmup: float = 0.04
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    seed: int = 0
    checkpoint_seconds: float = 120.0
    seconds: float | None = None
    optimizer: str = "adamw"
    shallow_layers: int | None = None
    shallow_share: float = 0.6

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("warmup", "final_learning_rate", "shallow_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("weight_decay", "checkpoint_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.shallow_layers is not None and self.shallow_layers < 1:
            raise ValueError(f"shallow_layers must be at least 1 or None, got {self.shallow_layers}")

    @property
    def steps(self) -> int:
        """Steps that the tokens are good for."""
        return max(1, self.tokens // (self.batch * self.block))

    def progress(self, step: int, seconds: float) -> float:
        """The part of the budget that `step` steps in so many seconds have spent, 1 at its end."""
        return min(1.0, step / self.steps if self.seconds is None else seconds / self.seconds)

    def rate_at(self, progress: float) -> float:
        """Linear warm-up, then cosine to `final_learning_rate` of the peak."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        after = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, after))))

    def layers_at(self, progress: float, depth: int) -> int:
        """Layers of a model of `depth` layers at this point of the run."""
        if self.shallow_layers is None or progress >= self.shallow_share:
            return depth
        return min(self.shallow_layers, depth)


def sample_blocks(tokens: torch.Tensor, config: FitConfig, step: int) -> torch.Tensor:
    """The training batch of a step: LongTensor [batch, block + 1] at offsets drawn from (seed, step).

    Raises ValueError if tokens [T] is not longer than a block.
    """
    if len(tokens) <= config.block:
        raise ValueError(f"{len(tokens)} training tokens are fewer than one block of {config.block} + 1: add source")
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - config.block, (config.batch,), generator=generator)
    return tokens[starts[:, None] + torch.arange(config.block + 1)]


def heldout_blocks(tokens: torch.Tensor, block: int, limit: int = 32) -> torch.Tensor:
    """At most `limit` evenly spaced blocks of tokens [T]: [count, block + 1]. Raises ValueError if there is not one."""
    count = min(limit, (len(tokens) - 1) // block)
    if count < 1:
        raise ValueError(f"the held-out part has {len(tokens)} tokens, fewer than one block of {block} + 1: add source")
    starts = torch.linspace(0, len(tokens) - 1 - block, count).long()
    return tokens[starts[:, None] + torch.arange(block + 1)]


def cross_entropy(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats of blocks [B, T + 1]."""
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: GPT2LMHeadModel, tokens: torch.Tensor, block: int, limit: int = 32) -> float:
    """Mean next-token loss in nats over at most `limit` evenly spaced held-out blocks."""
    blocks = heldout_blocks(tokens, block, limit).to(model.device)
    training = model.training
    model.eval()
    with autocast(model.device):
        losses = [cross_entropy(model, part).item() * len(part) for part in blocks.split(8)]
    model.train(training)
    return sum(losses) / len(blocks)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; on a CPU, fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def causal_attention(*models: GPT2LMHeadModel) -> Iterator[None]:
    """Within it the models run SDPA with `is_causal` and no mask tensor: for whole, unpadded blocks only.

    transformers builds a dense mask while a model is being compiled (and looks into the positions for packed
    sequences, a wait for the GPU, while it is not), and a mask rules the flash kernels out. An attention name without
    a mask function gets none.
    """
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(_CAUSAL)
    try:
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def forward_flops(model: GPT2LMHeadModel, block: int) -> float:
    """FLOPs a token of one forward pass: 2 a weight that multiplies, plus causal attention over `block`."""
    config, layers = model.config, len(model.transformer.h)
    inner = config.n_inner or 4 * config.n_embd
    weights = layers * (4 * config.n_embd**2 + 2 * config.n_embd * inner) + config.vocab_size * config.n_embd
    return 2.0 * weights + 2.0 * layers * config.n_embd * block


def compile_layers(model: GPT2LMHeadModel, **options: Any) -> None:
    """Compiles the layers of a model; they share the code, since they differ in their weights alone."""
    for layer in model.transformer.h:
        layer.compile(dynamic=False, **options)


def set_layers(model: GPT2LMHeadModel, layers: Sequence[torch.nn.Module]) -> None:
    """Makes these the layers of a model."""
    model.transformer.h = torch.nn.ModuleList(layers)


def fit(
    model: GPT2LMHeadModel,
    config: FitConfig,
    folder: Path,
    batch_at: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    report: Callable[[dict], None],
    evaluate: Callable[[], dict] | None = None,
    evaluate_every: int = 200,
    micro_batch: int | None = None,
    teacher: GPT2LMHeadModel | None = None,
    compiled: bool = True,
) -> GPT2LMHeadModel:
    """Trains `model` in place, from the checkpoint in `folder` if there is one, and leaves it in eval mode.

    batch_at(step) gives blocks [batch, block + 1]; loss_of(model, blocks) the scalar loss, a mean over the blocks.
    report gets a dict after each step (on a GPU, each tenth): step, steps (with a budget of seconds, as it looks),
    layers, loss, seconds since the last report, tokens_per_second, tflops and, every `evaluate_every` steps and at the
    end, evaluate()'s values.
    micro_batch: blocks a pass, the whole batch by default; gradients are added up.
    teacher: a frozen model that loss_of runs as well; here only for its attention, its compiling and its FLOPs.
    compiled: whether layers are compiled on a GPU. On a CPU nothing is.

    Raises ValueError if the folder holds a checkpoint of other settings or another model, or if the loss diverges.
    """
    if micro_batch is not None and (micro_batch < 1 or config.batch % micro_batch):
        raise ValueError(f"micro_batch must divide the batch of {config.batch}, got {micro_batch}")
    folder.mkdir(parents=True, exist_ok=True)
    device, layers = model.device, list(model.transformer.h)
    gpu = device.type == "cuda"
    models = [model] if teacher is None else [model, teacher]
    optimizers: list[torch.optim.Optimizer] = []

    def set_depth(depth: int, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Takes the first `depth` layers, new optimizers for them, and a state if there is one."""
        set_layers(model, layers[:depth])
        optimizers[:] = state.make_optimizers(model, config.optimizer, config.learning_rate, config.weight_decay)
        if tensors is not None:
            state.load_state(model, optimizers, tensors)
        if gpu and compiled:
            compile_layers(model)
        model.train()

    depth = config.layers_at(0.0, len(layers))
    first = state.restore(folder, asdict(config), FREE, lambda tensors, at: set_depth(at.layers, tensors))
    if not first.step:
        set_depth(depth)
    if gpu and compiled and teacher is not None:
        compile_layers(teacher)
    began = saved = last = time.perf_counter()
    step = counted = first.step
    progress = first.progress
    over = progress == 1 and first.layers == len(layers)
    while not over:  # at least one step has the whole depth
        depth = config.layers_at(progress, len(layers))
        if depth > len(model.transformer.h):
            # Clones: the deeper model's first layers are the ones that are repeated.
            tensors = {name: value.clone() for name, value in state.state_of(model, optimizers).items()}
            set_depth(depth, state.deeper(tensors, len(model.transformer.h), depth))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = config.rate_at(config.progress(step + 1, first.seconds + time.perf_counter() - began))
        blocks = batch_at(step)
        if gpu:
            blocks = blocks.pin_memory().to(device, non_blocking=True)
        model.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        drawn = torch.random.fork_rng([device] if gpu else [])
        with drawn, causal_attention(*models) if gpu else nullcontext():
            torch.manual_seed(config.seed * 1_000_003 + step)  # for a loss that draws noise
            for part in blocks.split(micro_batch or config.batch):
                with autocast(device):
                    share = loss_of(model, part) * (len(part) / len(blocks))
                share.backward()
                loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        seconds = first.seconds + time.perf_counter() - began
        progress = config.progress(step, seconds)
        over = progress == 1 and depth == len(layers)
        save = over or time.perf_counter() - saved > config.checkpoint_seconds
        due = evaluate is not None and (over or step % evaluate_every == 0)
        # Reading the loss waits for the device.
        if not gpu or save or due or step % 10 == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {step}: lower learning_rate ({config.learning_rate})")
            rate = (step - counted) * config.batch * config.block / (time.perf_counter() - last)
            flops = 3 * forward_flops(model, config.block)
            flops += 0 if teacher is None else forward_flops(teacher, config.block)
            values = {
                "step": step,
                "steps": max(step + (not over), round(step / max(progress, 1e-9))),
                "layers": depth,
                "loss": value,
            }
            values |= {"tokens_per_second": rate, "tflops": rate * flops / 1e12}
            if due and evaluate is not None:
                with torch.compiler.set_stance("force_eager"):  # other shapes, seldom: not worth compiling
                    values |= evaluate()
            if save:
                at = Position(step, seconds, progress, depth)
                state.save(folder, state.state_of(model, optimizers), asdict(config), at)
                saved = time.perf_counter()
            values["seconds"] = time.perf_counter() - last
            last, counted = time.perf_counter(), step
            report(values)
    for layer in (layer for each in models for layer in each.transformer.h):
        layer._compiled_call_impl = None  # compiled for training alone
    model.eval()
    return model


def load_weights(model: GPT2LMHeadModel, folder: Path, config: FitConfig) -> GPT2LMHeadModel:
    """Loads the weights of the checkpoint in `folder` into model, in place.

    Raises ValueError if there is none, or it belongs to another model or other settings.
    """
    if not (folder / state.CHECKPOINT).exists():
        raise ValueError(f"there is no {state.CHECKPOINT} in {folder}: train first")
    state.restore(folder, asdict(config), FREE, lambda tensors, _: state.load_state(model, [], tensors))
    return model.eval()
