"""Threads that run one pass together.

A pass is a row of stages, a stage a number of equal tasks. The caller does tasks of a stage until none is left, waits
for those that others still do, and goes on. Helper threads join while a pass runs and do the same. No task waits for a
helper: where one comes late, or never, the others do its share. So the number of threads changes no result.

A helper stays in compiled code between passes, where it sees the next one within a microsecond, for `PATIENCE` rounds
of giving way to other threads; then it sleeps until it is called. There is one team in a process. A pass that finds it
at work for another pass (of another thread) runs alone.

Everything that threads share is in the *board*, int64 words that are read and written atomically.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from stagedspec.kernels.compiled.build import compiled, entry, inlined, instruction

LINE = 16  # words between those that different threads write, so that they lie in different cache lines
ROUND, OPEN, INSIDE, THREADS, MODEL, LAST = (LINE * place for place in range(6))  # LAST: the number of stages
MOST = 64  # threads
SLEEPS = 6 * LINE  # a word for every helper: 1 while it sleeps
SEEN = SLEEPS + MOST  # a word for every helper: the round that it has seen last
INPUTS = SEEN + MOST  # numbers that describe the pass: `forward`
STAGES = INPUTS + 32  # two words for every stage, LINE words apart: tasks begun, tasks ended
ENDED = 8  # words from the one to the other
CALLER = -1  # in place of the number of a helper
PATIENCE = 50000  # rounds of waiting, about twenty milliseconds


def board(stages: int) -> np.ndarray:
    """The board of passes of up to so many stages."""
    return np.zeros(STAGES + LINE * stages, np.int64)


def _atomic(make: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Callable:
    """An intrinsic function (board, word, value) -> int64."""

    @instruction
    def operation(context: Any, shared: Any, word: Any, value: Any) -> tuple[Any, Callable]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            return make(builder, builder.gep(array.data, [arguments[1]]), arguments[2])

        return types.int64(shared, types.int64, types.int64), generate

    return operation


add = _atomic(lambda builder, place, value: builder.atomic_rmw("add", place, value, "seq_cst"))
put = _atomic(lambda builder, place, value: builder.atomic_rmw("xchg", place, value, "seq_cst"))
read = _atomic(lambda builder, place, value: builder.load_atomic(place, "seq_cst", 8))


@instruction
def give_way(context: Any) -> tuple[Any, Callable]:
    """Lets another thread run on this core, if one waits for it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
        if os.name == "posix":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


# ---------------------------------------------------------------- stages


@compiled
def begin_tasks(shared: np.ndarray, stage: int, tasks: int) -> tuple[int, int]:
    """The next tasks of a stage to do, [first, last); first == last when none is left."""
    share = max(1, tasks // (32 * read(shared, THREADS, 0)))
    first = min(tasks, add(shared, STAGES + LINE * stage, share))
    return first, min(tasks, first + share)


@compiled
def end_tasks(shared: np.ndarray, stage: int, count: int) -> None:
    """Tells that so many tasks are done."""
    add(shared, STAGES + LINE * stage + ENDED, count)


@compiled
def wait_for_tasks(shared: np.ndarray, stage: int, tasks: int) -> None:
    """Returns when all tasks of a stage are done."""
    spins = 0
    while read(shared, STAGES + LINE * stage + ENDED, 0) < tasks:
        spins += 1
        if spins > 200:
            give_way()


# ---------------------------------------------------------------- passes


@entry
def find_sleeping(shared: np.ndarray, sleeping: np.ndarray) -> None:
    """Sets sleeping to 1 for every helper that must be woken for the next pass. One that goes to sleep after this
    misses the pass, and the others do its share."""
    for helper in range(read(shared, THREADS, 0) - 1):
        sleeping[helper] |= put(shared, SLEEPS + helper, 0)


@inlined
def open_pass(shared: np.ndarray) -> None:
    """Lets helpers in."""
    for stage in range(shared[LAST]):
        put(shared, STAGES + LINE * stage, 0)
        put(shared, STAGES + LINE * stage + ENDED, 0)
    number = add(shared, ROUND, 1) + 1
    put(shared, OPEN, number)


@inlined
def close_pass(shared: np.ndarray) -> None:
    """Returns when no helper is inside the pass any more, and lets none in."""
    put(shared, OPEN, 0)
    spins = 0
    while read(shared, INSIDE, 0) > 0:
        spins += 1
        if spins > 200:
            give_way()


@entry
def next_pass(shared: np.ndarray, helper: int, model: int) -> int:
    """A helper waits for the next pass: 1: it is let in (it must `leave_pass`); 0: it must sleep; -1: the pass is of
    another model."""
    spins = 0
    while True:
        number = read(shared, ROUND, 0)
        if number != shared[SEEN + helper]:
            add(shared, INSIDE, 1)
            invited = helper < read(shared, THREADS, 0) - 1
            if read(shared, OPEN, 0) != 0 and invited:
                if read(shared, MODEL, 0) != model:
                    add(shared, INSIDE, -1)
                    return -1
                shared[SEEN + helper] = read(shared, ROUND, 0)
                return 1
            add(shared, INSIDE, -1)
            if read(shared, ROUND, 0) == number:  # it is over, or for fewer threads
                shared[SEEN + helper] = number
        spins += 1
        if spins > 100:
            give_way()
        if spins > PATIENCE:
            put(shared, SLEEPS + helper, 1)
            if read(shared, ROUND, 0) == shared[SEEN + helper] or put(shared, SLEEPS + helper, 0) == 0:
                return 0


@inlined
def leave_pass(shared: np.ndarray) -> None:
    """A helper has done its part of the pass that it was let into."""
    add(shared, INSIDE, -1)
