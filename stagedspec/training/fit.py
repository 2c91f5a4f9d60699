"""The resumable training loop of target and draft, which differ only in the loss.

A checkpoint is safetensors (weights, optimizer moments) plus JSON (step, settings): nothing pickled.
The batch of step i and the noise of its loss depend only on (seed, i), and there is no dropout. So a resumed run sees
the same data as an uninterrupted one; on a CPU both end bitwise equal.

What a large model needs to use a GPU's matrix units, and where it is done:
- bf16 products on fp32 master weights (`autocast`), fused AdamW: one read and write of the moments a step.
- model and loss compiled as one function: the bf16 logits [B, T, V] are then the only tensor of their size; the
  conversion to fp32, the log-softmax and its gradient are fused into the kernels that read and write them.
- causal attention without a mask tensor (`causal_attention`), so that the flash kernels apply.
- `micro_batch`: a step of many tokens in parts that fit into memory, gradients added up. The casts of the weights to
  bf16 and the optimizer's traffic cost a few milliseconds each, little beside a micro-batch of 30,000 tokens.
- nothing waits for the GPU within a step: batches are made in pinned memory and copied asynchronously, and the loss
  is read every tenth step.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stagedspec.kernels.common.files import replacing

CHECKPOINT = "checkpoint.safetensors"
_CAUSAL = "stagedspec_causal"


@dataclass(frozen=True)
class FitConfig:
    """Settings of one training run. `tokens` is the whole budget; one step sees batch * block of them.

    learning_rate: the peak; warmup: fraction of the steps; final_learning_rate: fraction of the peak.
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

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("warmup", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("weight_decay", "checkpoint_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * self.block))

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine to `final_learning_rate` of the peak."""
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


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
    config = model.config
    inner = config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner) + config.vocab_size * config.n_embd
    return 2.0 * weights + 2.0 * config.n_layer * config.n_embd * block


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
) -> GPT2LMHeadModel:
    """Trains `model` in place, from the checkpoint in `folder` if there is one, and leaves it in eval mode.

    batch_at(step) gives blocks [batch, block + 1]; loss_of(model, blocks) the scalar loss, a mean over the blocks.
    report gets a dict after each step (on a GPU, each tenth): step, steps, loss, seconds since the last report,
    tokens_per_second, tflops and, every `evaluate_every` steps and at the end, evaluate()'s values.
    micro_batch: blocks a pass, the whole batch by default; gradients are added up.
    teacher: a frozen model that loss_of runs as well; here only for its attention and its FLOPs.

    Raises ValueError if the folder holds a checkpoint of other settings or another model, or if the loss diverges.
    """
    if micro_batch is not None and (micro_batch < 1 or config.batch % micro_batch):
        raise ValueError(f"micro_batch must divide the batch of {config.batch}, got {micro_batch}")
    folder.mkdir(parents=True, exist_ok=True)
    device = model.device
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    first = _restore(folder, model, optimizer, config)
    models = [model] if teacher is None else [model, teacher]
    flops = 3 * forward_flops(model, config.block)
    if teacher is not None:
        flops += forward_flops(teacher, config.block)
    gpu = device.type == "cuda"
    step_loss = torch.compile(loss_of) if gpu else loss_of
    model.train()
    saved = last = time.perf_counter()
    counted = first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step)
        blocks = batch_at(step)
        if gpu:
            blocks = blocks.pin_memory().to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        drawn = torch.random.fork_rng([device] if gpu else [])
        with drawn, causal_attention(*models) if gpu else nullcontext():
            torch.manual_seed(config.seed * 1_000_003 + step)  # for a loss that draws noise
            for part in blocks.split(micro_batch or config.batch):
                with autocast(device):
                    share = step_loss(model, part) * (len(part) / len(blocks))
                share.backward()
                loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        save = done == config.steps or time.perf_counter() - saved > config.checkpoint_seconds
        due = evaluate is not None and (done == config.steps or done % evaluate_every == 0)
        # Reading the loss waits for the device.
        if not gpu or save or due or done % 10 == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {done}: lower learning_rate ({config.learning_rate})")
            seconds = time.perf_counter() - last
            rate = (done - counted) * config.batch * config.block / seconds
            values = {"step": done, "steps": config.steps, "loss": value, "tokens_per_second": rate}
            values["tflops"] = rate * flops / 1e12
            if due and evaluate is not None:
                values |= evaluate()
            if save:
                _checkpoint(folder, model, optimizer, config, done)
                saved = time.perf_counter()
            values["seconds"] = time.perf_counter() - last
            last, counted = time.perf_counter(), done
            report(values)
    model.eval()
    return model


def finished_steps(folder: Path) -> int:
    """The step of the checkpoint in `folder`, 0 if there is none. Raises ValueError if it is damaged."""
    path = folder / CHECKPOINT
    return int(_metadata(path)["step"]) if path.exists() else 0


def load_weights(model: GPT2LMHeadModel, folder: Path, config: FitConfig) -> GPT2LMHeadModel:
    """Loads the weights of the checkpoint in `folder` into model, in place.

    Raises ValueError if there is none, or it belongs to another model or other settings.
    """
    if not (folder / CHECKPOINT).exists():
        raise ValueError(f"there is no {CHECKPOINT} in {folder}: train first")
    _restore(folder, model, None, config)
    return model.eval()


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to train again") from error
    if not {"step", "config"} <= metadata.keys():
        raise ValueError(f"{path} is no checkpoint of this trainer; remove it to train again")
    return metadata


def _checkpoint(
    folder: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, config: FitConfig, step: int
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    with replacing(folder / CHECKPOINT) as part:  # a killed run leaves the last whole one
        save_file(tensors, part, metadata={"step": str(step), "config": json.dumps(asdict(config))})


def _restore(folder: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer | None, config: FitConfig) -> int:
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    metadata = _metadata(path)
    stored, wanted = json.loads(metadata["config"]), asdict(config)
    for key in wanted:
        if key != "checkpoint_seconds" and stored.get(key) != wanted[key]:
            raise ValueError(
                f"{path} was written with {key}={stored.get(key)}, not {wanted[key]}: remove the folder or use the "
                "same settings"
            )
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = tensors.get(f"weight.{name}")
            if weight is None or weight.shape != parameter.shape:
                raise ValueError(f"{path} belongs to a model of another shape (at {name}): remove the folder")
            parameter.copy_(weight)
            if optimizer is not None:
                # A fused optimizer wants all of it, the step too, beside the parameter.
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in keys}
    return int(metadata["step"])
