"""Times the first calls of a process: imports, loading, first and second `generate`. latency.py runs it.

    python bench/first_use.py --target FOLDER [--draft FOLDER] [--ngram FILE] [--side staged] [--sampling greedy]

Prints one line of JSON. The caller chooses the caches by environment variables (`cache_environment`). `in_a_process`
runs it in a process that finds everything imported, and nothing else: imports take longer than all the rest.
"""
# ruff: noqa: E402 (the clock starts before the imports, which are timed)

import time

BEGIN = time.perf_counter()

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoConfig, CompileConfig, GenerationConfig, GPT2LMHeadModel
from transformers.utils import logging

import stagedspec
from stagedspec.devices import resolve_device, resolve_dtype
from stagedspec.models.loading import no_bars

IMPORT_SECONDS = time.perf_counter() - BEGIN
PLAIN, COMPILED = "transformers", "transformers compiled"
SIDES = (*stagedspec.MODES, PLAIN, COMPILED)
SAMPLINGS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 50}}
TREE_FIELDS = ("nodes", "depth", "passes", "width", "children", "prefetch", "prefetch_width")
SEED = 0
# Its server imports this file and never touches the GPU; every process is forked from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["first_use"])


def cache_environment(compiled: Path, tuning: Path) -> dict[str, str]:
    """Environment variables that choose the folders of compiled code and of measured tuning."""
    places = {"TRITON_CACHE_DIR": "triton", "NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor",
              "CUDA_CACHE_PATH": "cuda"}  # fmt: skip
    found = {name: str(compiled / folder) for name, folder in places.items()}
    # The hub's cache would follow XDG_CACHE_HOME, and models be downloaded again.
    return found | {"XDG_CACHE_HOME": str(tuning), "HF_HOME": constants.HF_HOME}


def parse_tree(text: str) -> "stagedspec.TreeConfig | str":
    """ "auto", or all fields of a TreeConfig that drafts: "32,8,4,4,4,1,2". Raises ValueError for other words."""
    if text == "auto":
        return text
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(TREE_FIELDS) or values[0] < 2:
        raise ValueError(
            f"--tree must be auto or {len(TREE_FIELDS)} numbers, {','.join(TREE_FIELDS)}, with at least 2 nodes, got "
            f"{text!r}"
        )
    return stagedspec.TreeConfig(**dict(zip(TREE_FIELDS, values, strict=True)))


def load_decoder(options: argparse.Namespace) -> stagedspec.Decoder:
    decoder = stagedspec.Decoder.from_pretrained(
        options.target, options.draft, options.ngram, device=options.device, dtype=options.dtype,
        backend=options.backend, tree=parse_tree(options.tree),
    )  # fmt: skip
    synchronise(decoder.device)
    return decoder


def load_transformers(options: argparse.Namespace) -> GPT2LMHeadModel:
    """The target as transformers loads it. It never stops at an end-of-text token."""
    device = resolve_device(options.device)
    with no_bars():
        model = GPT2LMHeadModel.from_pretrained(
            options.target, use_safetensors=True, dtype=resolve_dtype(options.dtype, device)
        )
    model = model.to(device).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    synchronise(device)
    return model


def positions(target: str) -> int:
    """How many positions the target has."""
    return AutoConfig.from_pretrained(target).n_positions


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prompt(tokenizer, vocab: int, length: int) -> torch.Tensor:
    """LongTensor [1, length]: Python source where there is a tokenizer, else random tokens."""
    if tokenizer is None:
        return torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(SEED))
    ids: list[int] = []
    text = Path(stagedspec.decoder.__file__).read_text(encoding="utf-8")
    while len(ids) < length:
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([ids[:length]])


class Ours:
    """One of the decoder's modes. `generate` gives the new tokens and the steps that wrote them."""

    def __init__(self, decoder: stagedspec.Decoder, mode: str, sampling: str):
        self.decoder = decoder
        self.settings = {"mode": mode, "seed": SEED, "eos_token_id": [], **SAMPLINGS[sampling]}

    def generate(self, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], int]:
        output = self.decoder.generate(ids, max_new_tokens=new_tokens, **self.settings)
        return output[0, ids.shape[1] :].tolist(), self.decoder.last_stats.steps

    def first_token(self, ids: torch.Tensor, new_tokens: int) -> float:
        """Seconds until the first token of a stream. The stream runs to its end, so that its memory can be kept."""
        begin = time.perf_counter()
        stream = self.decoder.stream(ids, new_tokens, **self.settings)
        next(stream)
        seconds = time.perf_counter() - begin
        for _ in stream:
            pass
        return seconds

    def own_first_token(self) -> float | None:
        """Statistics of the last call, if it has any."""
        return getattr(self.decoder.last_stats, "seconds_to_first_token", None)


class Theirs:
    """transformers `generate`, eager, or compiled with a static cache. A token is a step."""

    def __init__(self, model: GPT2LMHeadModel, sampling: str, compiled: bool):
        self.model = model
        self.settings = {"pad_token_id": 0, **SAMPLINGS[sampling]}
        if compiled:
            settings = CompileConfig()
            settings._compile_all_devices = True  # else only GPUs compile
            self.settings |= {"cache_implementation": "static", "compile_config": settings}

    def generate(self, ids: torch.Tensor, new_tokens: int, streamer=None) -> tuple[list[int], int]:
        ids = ids.to(self.model.device)
        config = GenerationConfig(max_new_tokens=new_tokens, **self.settings)
        torch.manual_seed(SEED)
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            output = self.model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)
        return output[0, ids.shape[1] :].tolist(), new_tokens

    def first_token(self, ids: torch.Tensor, new_tokens: int) -> float:
        """Seconds until the streamer gets the first token."""
        streamer = FirstToken()
        begin = time.perf_counter()
        self.generate(ids, new_tokens, streamer)
        return streamer.times[1] - begin

    def own_first_token(self) -> None:
        return None


class FirstToken:
    """A streamer that records the time of each call: for the prompt, then for every token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def first_calls(options: argparse.Namespace) -> dict:
    """Loads and generates twice. Returns the seconds and the tokens."""
    times = [time.perf_counter()]
    if options.side in stagedspec.MODES:
        decoder = load_decoder(options)
        times.append(time.perf_counter())
        ids = prompt(decoder.tokenizer, decoder.target.vocab_size, options.prompt_tokens)
        side = Ours(decoder, options.side, options.sampling)
    else:
        model = load_transformers(options)
        times.append(time.perf_counter())
        ids = prompt(None, model.config.vocab_size, options.prompt_tokens)
        side = Theirs(model, options.sampling, options.side == COMPILED)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        tokens, _ = side.generate(ids, options.new_tokens)
        seconds.append(time.perf_counter() - begin)
    return {
        "import_seconds": IMPORT_SECONDS,
        "load_seconds": times[1] - times[0],
        "first_seconds": seconds[0],
        "second_seconds": seconds[1],
        "tokens": tokens,
        "tree": decoder.last_stats.tree if options.side in stagedspec.MODES else None,
        "backend": decoder.backend if options.side in stagedspec.MODES else None,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft")
    parser.add_argument("--ngram")
    parser.add_argument("--side", choices=SIDES, default="staged")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="greedy")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    return first_calls(options)


def in_a_process(arguments: list[str], environment: dict[str, str], seconds: float) -> dict | None:
    """Runs this file with these arguments and environment variables in a process of its own. Returns what it measures.

    None after a timeout. Raises ValueError if the process fails.
    """
    with _importable():
        forkserver.ensure_running()
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_answer, args=(theirs, arguments, environment))
    process.start()
    theirs.close()
    try:
        answer = json.loads(ours.recv_bytes()) if ours.poll(seconds) else None
    except EOFError:
        answer = {"error": "the process ended early"}
    finally:
        process.kill()
        process.join()
        ours.close()
    if answer is not None and "error" in answer:
        raise ValueError(f"first use with {' '.join(arguments)} failed: {answer['error']}")
    return answer


@contextmanager
def _importable() -> Iterator[None]:
    """Puts this folder on PYTHONPATH: before Python 3.13 the server process does not inherit sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parent), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _answer(connection: Connection, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        answer = measure(parse(arguments))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    connection.send_bytes(json.dumps(answer).encode())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = measure(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
