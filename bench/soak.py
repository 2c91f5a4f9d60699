"""Minutes of mixed generations from several threads, every output compared with plain decoding, and memory watched.

    python bench/soak.py [--minutes 10] [--random L --device cuda] [--workers 3] [--seed 0] [--out FILE] [--plot FILE]

Ragged batches, all modes, all samplings, processors that raise, streams closed early, stopping criteria, prompt
look-up, kept memory released and, on a GPU, memory nearly full. Exit status 1: an output that differs, an error that
was not planned, a call that never ends, or memory that grows. See bench/README.md.
"""

import os

if __name__ == "__main__":
    # oneDNN keeps compiled code for every number of rows that it multiplies, up to 1024 kinds: hundreds of MiB, which
    # fill up for as long as new shapes come. Fewer kinds fill up sooner.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import argparse
import faulthandler
import gc
import json
import random
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path

import torch

import first_use
import memory
import soak_calls
from machine import arguments_of, header, where
from random_models import add_model_options, checkpoints
from sides import check_options, clear_errors
from soak_calls import Call
from stagedspec import Decoder, TreeConfig
from stagedspec.cli.output import quiet_transformers
from stagedspec.devices import resolve_device
from stagedspec.kernels.common.files import write_text

TREE = TreeConfig(8, 4, 2, 2, 3, 1, 2)  # of the decoder whose trees do not adapt
RELEASE_EVERY = 40  # calls of a worker between two releases of kept memory, about
TIGHT_SECONDS = 15.0  # memory is nearly full for so long, then free for so long
STUCK_SECONDS = 120.0  # a call that takes longer after the end of the run is taken to be stuck
MOST_PROBLEMS = 20  # the run ends after this many


def decoders_of(options: argparse.Namespace) -> tuple[Decoder, dict[str, Decoder]]:
    """The decoder that all outputs are compared with, and those under test: each has models of its own."""
    more = {"device": options.device, "dtype": options.dtype, "backend": options.backend}
    target, draft, ngram = options.target, options.draft, options.ngram
    found = {"lookup": Decoder.from_pretrained(target, **more)}
    if draft is not None:
        found["adaptive"] = Decoder.from_pretrained(target, draft, ngram, **more)
        found["fixed tree"] = Decoder.from_pretrained(target, draft, tree=TREE, **more)
    return Decoder.from_pretrained(target, **more), found


class Soak:
    """The state that workers share: decoders, expected outputs, counts and problems."""

    def __init__(self, reference: Decoder, decoders: dict[str, Decoder], seed: int, calls: int):
        self.plain, self.decoders, self.seed, self.calls = reference, decoders, seed, calls
        tokenizer, vocab = reference.tokenizer, reference.target.vocab_size
        self.text = first_use.prompt(tokenizer, vocab, 4096)[0].tolist()
        self.ended = threading.Event()
        self.tight = False  # whether memory is nearly full
        self.counts: Counter[str] = Counter()
        self.planned: Counter[str] = Counter()
        self.made: Counter[str] = Counter()  # calls by kind and mode
        self.problems: list[str] = []
        self._expected: dict[int, list[list[int]] | str] = {}
        self._lock, self._plain_lock = threading.Lock(), threading.Lock()

    def call(self, index: int) -> Call:
        target = self.plain.target
        return soak_calls.draw(self.seed, index, self.text, target.vocab_size, target.positions)

    def expected(self, call: Call) -> "list[list[int]] | str":
        """The result of the call by plain decoding, computed once."""
        with self._plain_lock:
            if call.index not in self._expected:
                self._expected[call.index] = soak_calls.reference(self.plain, call)
            return self._expected[call.index]

    def prepare(self) -> None:
        """Runs every call by plain decoding, for the outputs to compare with. So every shape of prompt occurs once.

        One call of every kind goes through all modes of all decoders: what is compiled for it is loaded, and stays.
        """
        met = set()
        for index in range(self.calls):
            call = self.call(index)
            self.expected(call)
            for name, decoder in self.decoders.items():
                for mode in soak_calls.modes_of(decoder):
                    if (kind := (name, mode, call.kernels)) not in met:
                        met.add(kind)
                        self.one(index, name, mode)

    def one(self, index: int, name: str, mode: str) -> None:
        """Runs one call, compares its output and counts the result."""
        call, tight = self.call(index), self.tight
        try:
            expected = self.expected(call)
            found = soak_calls.outcome(self.decoders[name], call, mode)
        except torch.OutOfMemoryError:
            if tight or self.tight:
                self.count(self.planned, "out of memory, while it was nearly full")
                return
            self.problem("out of memory", call, name, mode, traceback.format_exc(limit=-3))
        except Exception:
            self.problem("unplanned error", call, name, mode, traceback.format_exc())
        else:
            different = soak_calls.difference(call, expected, found)
            if different is not None:
                self.problem("DIFFERENT OUTPUT", call, name, mode, different)
            if isinstance(found, str):
                self.count(self.planned, found)
            else:
                self.count(self.counts, "generations")
                self.count(self.counts, "tokens", sum(map(len, found)))
            self.count(self.made, f"{call.kind}, {mode}")

    def count(self, counter: Counter, name: str, number: int = 1) -> None:
        with self._lock:
            counter[name] += number

    def problem(self, kind: str, call: Call, name: str, mode: str, detail: str) -> None:
        place = f"decoder {name!r}, mode {mode!r}, --seed {self.seed} --only {call.index}"
        text = f"{kind}: {place}\n{call.describe()}\n{detail}"
        with self._lock:
            self.problems.append(text)
            print(text, file=sys.stderr, flush=True)
            if len(self.problems) >= MOST_PROBLEMS:
                self.ended.set()

    def work(self, worker: int) -> None:
        """Makes calls until the run ends, in an order that depends on the seed and the worker."""
        rng = random.Random(f"{self.seed} worker {worker}")
        while not self.ended.is_set():
            name = rng.choice(list(self.decoders))
            mode = rng.choice(soak_calls.modes_of(self.decoders[name]))
            self.one(rng.randrange(self.calls), name, mode)
            if rng.randrange(RELEASE_EVERY) == 0:
                self.decoders[name].release()
                self.count(self.counts, "releases")


# ---------------------------------------------------------------- memory nearly full


class Squeeze:
    """Alternates between nearly full and free GPU memory, by a limit for this process.

    The limit leaves half of what the calls of the warm-up took beyond the models. Does nothing on a CPU.
    """

    def __init__(self, soak: Soak, device: torch.device):
        self.soak, self.device = soak, device
        self.on = device.type == "cuda"
        self.models = torch.cuda.memory_allocated(device) if self.on else 0
        self.limit: float | None = None

    def at(self, seconds: float, warm_up: float) -> None:
        """Sets the limit for the current time of the run."""
        if not self.on or seconds < warm_up:
            return
        if self.limit is None:
            most = torch.cuda.max_memory_allocated(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            self.limit = (self.models + (most - self.models) / 2) / total
        tight = int((seconds - warm_up) / TIGHT_SECONDS) % 2 == 0
        if tight != self.soak.tight:
            torch.cuda.set_per_process_memory_fraction(self.limit if tight else 1.0, self.device)
            self.soak.tight = tight

    def close(self) -> None:
        if self.on:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


# ---------------------------------------------------------------- the run


def soak_for(soak: Soak, seconds: float, warm_up: float, workers: int, device: torch.device) -> memory.Sampler:
    """Runs the workers for the given time. Returns the samples of memory."""
    threads = [threading.Thread(target=soak.work, args=(number,), daemon=True) for number in range(workers)]
    sampler = memory.Sampler(device, min(2.0, seconds / 60))
    sampler.start()
    begin = time.perf_counter()
    with closing(Squeeze(soak, device)) as squeeze, stopping(soak):
        for thread in threads:
            thread.start()
        while (passed := time.perf_counter() - begin) < seconds and not soak.ended.wait(min(1.0, seconds / 20)):
            squeeze.at(passed, warm_up)
    sampler.stop()
    for thread in threads:
        thread.join(STUCK_SECONDS)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(all_threads=True)
        soak.problems.append(f"a call did not end within {STUCK_SECONDS:.0f} s")
    return sampler


@contextmanager
def stopping(soak: Soak):
    """Stops the workers when the block ends, also by an error."""
    try:
        yield
    finally:
        soak.ended.set()


def at_rest(soak: Soak, device: torch.device) -> dict[str, int]:
    """Memory by name after everything kept from earlier calls is released."""
    for decoder in (soak.plain, *soak.decoders.values()):
        decoder.release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return memory.sample(device)


def repeat(soak: Soak, index: int) -> None:
    """One call in every mode of every decoder, in one thread."""
    print(soak.call(index).describe())
    for name, decoder in soak.decoders.items():
        for mode in soak_calls.modes_of(decoder):
            soak.one(index, name, mode)


def results(soak: Soak, sampler: memory.Sampler, seconds: float, warm_up: float) -> dict:
    """The report: counts, problems and memory."""
    growths = {name: memory.growth(sampler.seconds, values, warm_up) for name, values in sampler.values.items()}
    names = ("generations", "tokens", "releases")
    return {
        "seconds": seconds,
        "warm_up_seconds": warm_up,
        **{name: soak.counts[name] for name in names},
        "planned_errors": dict(sorted(soak.planned.items())),
        "problems": soak.problems,
        "calls": dict(sorted(soak.made.items())),
        "memory": {
            name: None if found is None else vars(found) | {"grows": found.grows} for name, found in growths.items()
        },
        "memory_rule": memory.RULE,
        "grows": [name for name, found in growths.items() if found is not None and found.grows],
        "samples": {"seconds": sampler.seconds, **sampler.values},
        "lines": [f"{name.replace('_', ' ')}: {found or 'too few samples'}" for name, found in growths.items()],
    }


def summary(report: dict) -> str:
    loaded = report["memory_before"]
    planned = ", ".join(f"{count} {name}" for name, count in report["planned_errors"].items()) or "none"
    lines = [
        f"{report['seconds']:.0f} s: {report['generations']} generations, {report['tokens']} tokens compared, "
        f"{report['releases']} releases",
        f"planned errors: {planned}",
        f"problems: {len(report['problems'])}",
        f"memory after the first {report['warm_up_seconds']:.0f} s: " + "; ".join(report["lines"]),
        report["memory_rule"],
        "memory at rest, MiB, before the run and at the end: "
        + "; ".join(
            f"{name.replace('_', ' ')} {before / memory.MIB:.0f} and {after / memory.MIB:.0f}"
            for (name, before), after in zip(loaded.items(), report["memory_at_the_end"].values(), strict=True)
        ),
        f"{report['command']}",
        where(report),
    ]
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="(default 10)")
    parser.add_argument("--workers", type=int, default=3, help="threads that generate (default 3)")
    parser.add_argument("--calls", type=int, default=100, help="different calls that are drawn (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls and of their order")
    parser.add_argument("--only", type=int, metavar="INDEX", help="repeat this call alone, in every mode")
    parser.add_argument("--out", type=Path, help="write results as JSON")
    parser.add_argument("--plot", type=Path, help="write memory over time as SVG")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options out of range."""
    for name in ("workers", "calls", "minutes"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
    for name in ("out", "plot"):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"--{name}: the folder {path.parent} does not exist")
    resolve_device(options.device)


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = arguments_of(arguments)
    options = parse(arguments)
    check(options)
    quiet_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    with checkpoints(options, device) as (options.target, options.draft, options.ngram):
        soak = Soak(*decoders_of(options), options.seed, options.calls)
    if options.only is not None:
        repeat(soak, options.only)
        print(f"{len(soak.problems)} problems")
        return 1 if soak.problems else 0
    seconds = 60 * options.minutes
    warm_up = min(60.0, seconds / 5)
    begin = time.perf_counter()
    soak.prepare()
    took = time.perf_counter() - begin
    print(
        f"{soak.calls} calls by plain decoding, and one of each kind by all: {took:.0f} s", file=sys.stderr, flush=True
    )
    loaded = at_rest(soak, device)
    sampler = soak_for(soak, seconds, warm_up, options.workers, device)
    report = header("soak.py", arguments, device) | results(soak, sampler, seconds, warm_up)
    report |= {"memory_before": loaded, "memory_at_the_end": at_rest(soak, device)}
    if options.out is not None:
        write_text(options.out, json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        memory.plot(sampler.seconds, sampler.values, warm_up, options.plot)
    print(summary(report))
    return 1 if report["problems"] or report["grows"] else 0


if __name__ == "__main__":
    sys.exit(main())
