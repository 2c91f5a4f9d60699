"""Decodes a few steps under a profiler, after a warm-up. All scripts here run it.

    python profiling/step.py [--shape L | --target FOLDER --draft FOLDER --ngram FILE] [--mode staged] [--steps 4]

By default the embedded models decode. --shape uses random weights in a GPT-2's shape, with a draft of 40M parameters,
and downloads nothing. The tree is the same in every step. On a GPU the profiled steps run between
cudaProfilerStart and cudaProfilerStop; with STAGEDSPEC_NVTX=1 their phases are NVTX ranges, and no step is captured.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stagedspec
from stagedspec.cli.output import quiet_transformers
from stagedspec.decoding.generation import Generation
from stagedspec.decoding.request import StagedOptions
from stagedspec.decoding.stats import Mark
from stagedspec.devices import resolve_device, resolve_dtype
from stagedspec.models.shapes import SIZES, ModelShape

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # machine.py, sides.py: shared with the benchmarks
from sides import check_options, clear_errors

SHAPES = {name: SIZES[name] for name in ("S", "M", "L", "XL")}
DRAFT = ModelShape(4, 512, 8)  # 39M parameters, about the size of the paper's


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="hub id or folder; default: the embedded target, draft and n-gram table")
    parser.add_argument("--draft", help="hub id or folder of the draft")
    parser.add_argument("--ngram", type=Path, help="n-gram table")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this GPT-2's shape, and a draft of 40M")
    parser.add_argument("--mode", choices=stagedspec.MODES, default="staged")
    parser.add_argument("--tree", default="", metavar="nodes=12,depth=6,...", help="fields of TreeConfig")
    parser.add_argument("--sample", action="store_true", help="sampled (top-k 50, T=1) instead of greedy")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="(default 128)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the profiled ones (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="steps to profile (default 4)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto")


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def load(options: argparse.Namespace) -> stagedspec.Decoder:
    """The decoder that the options describe. Raises ValueError for what is missing or does not fit together."""
    quiet_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("device", "dtype", "backend")} | {"tree": tree(options.tree)}
    if options.shape is not None:
        if options.target or options.draft or options.ngram:
            raise ValueError("--shape takes random weights: leave out --target, --draft and --ngram")
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        target, draft = (random_model(shape, device, dtype) for shape in (SHAPES[options.shape], DRAFT))
        return stagedspec.Decoder.from_pretrained(target, draft, **settings)
    if options.target is None:
        if options.draft or options.ngram:
            raise ValueError("--draft and --ngram belong to a target: add --target")
        return stagedspec.Decoder.default(**settings)
    return stagedspec.Decoder.from_pretrained(options.target, options.draft, options.ngram, **settings)


def tree(text: str) -> stagedspec.TreeConfig:
    """ "nodes=64,depth=8" to a TreeConfig. Raises ValueError for other words."""
    try:
        pairs = [field.split("=") for field in text.split(",") if field]
        return stagedspec.TreeConfig(**{name: int(value) for name, value in pairs})
    except TypeError:
        raise ValueError(f"--tree must name fields of TreeConfig, such as nodes=64,depth=8, got {text!r}") from None
    except ValueError as error:
        raise ValueError(
            f"--tree: {error}; expected fields of TreeConfig such as nodes=64,depth=8, got {text!r}"
        ) from None


def random_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    with device:
        config = GPT2Config(n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads)
        return GPT2LMHeadModel(config).to(dtype).eval()


def prompt(decoder: stagedspec.Decoder, options: argparse.Namespace) -> torch.Tensor:
    """[batch, prompt tokens]: Python source where there is a tokenizer, else random tokens."""
    if decoder.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(decoder.target.vocab_size, (options.batch, options.prompt_tokens), generator=generator)
    ids = decoder.tokenizer(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    if len(ids) < options.prompt_tokens:
        raise ValueError(f"--prompt-tokens: the prompt has {len(ids)} tokens, {options.prompt_tokens} were asked for")
    return torch.tensor([ids[: options.prompt_tokens]] * options.batch)


def steps(decoder: stagedspec.Decoder, options: argparse.Namespace, mark: Mark = nullcontext) -> Iterator[Generation]:
    """Decodes and warms up, then yields before every profiled step and once after the last, when the device is done.

    mark: what the steps are marked with. Raises ValueError where a generation has not so many steps.
    """
    ids = prompt(decoder, options)
    room = decoder.target.positions - ids.shape[1]
    sampling = {"do_sample": True, "top_k": 50} if options.sample else {}
    call = decoder._read(ids, None, max(room, 1), StagedOptions(options.mode, 0), {"eos_token_id": [], **sampling})
    run = decoder._start(call.request)
    generation = run.steps()
    for number in range(options.warm_up + options.steps):
        if number >= options.warm_up:
            yield synchronised(run)
        with mark("step"):
            ended = next(generation, "ended")
        if ended:
            raise ValueError(
                f"the generation ended after {number} steps, fewer than --warm-up {options.warm_up} and --steps "
                f"{options.steps} ask for; ask for fewer, or a shorter prompt"
            )
    yield synchronised(run)


def synchronised(run: Generation) -> Generation:
    """The generation, after its device has finished."""
    device = run.engine.target.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return run


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    options = parse(parser, arguments)
    decoder = load(options)
    watched = decoder.device.type == "cuda"
    generation = steps(decoder, options, decoder.mark or nullcontext)
    next(generation)
    if watched:
        torch.cuda.profiler.start()
    for _ in generation:
        pass
    if watched:
        torch.cuda.profiler.stop()
    print(f"{options.steps} steps of {options.mode} on {decoder.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
