"""Callbacks per position, although a step accepts several tokens: logits processors, criteria and streamers.

`generate` of transformers calls its logits processors, stopping criteria and streamer once per position, with the
sequences of the whole batch. Here rows accept different numbers of tokens per step. Two rules give each of those
callables exactly the calls that it gets from transformers:

- Logits processors change the chosen token. They are applied along the accepted path: at the root of every row, then at
  the accepted children, until some row has no matching child. All rows then accept that many tokens, so that each call
  sees the batch at one length, as processors with state or across rows expect. Other nodes are never processed, since
  their choice is not used. In a batch all rows advance at the pace of the slowest. Rows that have stopped show logits
  of 0, where transformers shows the model's output after padding: only a processor that lets stopped rows change other
  rows can see the difference.
- Stopping criteria and streamers only see chosen tokens. They are called after the step, for every position that all
  rows have reached. Tokens that a row decoded beyond its end are dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from stagedspec.kernels.backends.interface import Backend, NoiseAt, Sequences, Trees
from stagedspec.kernels.common.constants import INVALID, NO_TOKEN, UNCHOSEN


class Streamer(Protocol):
    """A streamer of transformers, or an object of the caller's with the same two methods."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class Callbacks:
    """The callbacks of one generation.

    input_ids: LongTensor [B, prompt], padding included, as processors and criteria are to see it.
    new_tokens: the most to write; pad: the token that fills up rows that have stopped; eos: ids that end a row.
    processors: (ids [B, L], logits fp32 [B, V]) -> scores [B, V]; criteria: (ids [B, L], scores) -> bool [B].
    pads: whether a row that a criterion stopped is filled up with `pad`; else it goes on decoding until all have
    stopped, as transformers does where no end-of-sequence id is set.
    keep: which of "scores" and "logits" to record, a tensor [B, V] a position, where input_ids lie; zeros for rows that
    have stopped.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        new_tokens: int,
        pad: int,
        eos: Sequence[int] = (),
        processors: Callable | None = None,
        criteria: Callable | None = None,
        streamer: Streamer | None = None,
        pads: bool = True,
        keep: Sequence[str] = (),
    ):
        self.batch, self.width = input_ids.shape
        with torch.inference_mode(False):  # whatever the caller's: it is written to outside
            self.ids = torch.cat((input_ids, input_ids.new_full((self.batch, new_tokens), pad)), 1)
        self.pad, self.eos, self.pads = pad, frozenset(eos), pads
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in keep}
        self.processed = self.notified = 0  # positions seen by processors, by criteria and streamer
        self.unfinished = [True] * self.batch

    @property
    def chooses(self) -> bool:
        """Whether tokens are chosen here, by `choose_with_processors`."""
        return self.processors is not None or bool(self.kept)

    # User code runs here: outside of inference mode, so that it may keep and change the tensors it is given.
    @torch.inference_mode(False)
    @torch.no_grad()
    def choose_with_processors(
        self, ops: Backend, trees: Trees, logits: torch.Tensor, warping: dict | None, noise: NoiseAt | None
    ) -> torch.Tensor:
        """Chooses along the accepted path: logits [B, N, V] -> tokens [B, N], UNCHOSEN at all other nodes."""
        rows, device = trees.sequences.rows, logits.device
        live = [row.running for row in rows]
        chosen = torch.full(logits.shape[:2], UNCHOSEN, device="cpu")
        if not any(live):  # a host that learns late that all rows have stopped
            return chosen.to(device)
        children = trees.children
        left = max(row.limit - len(row.tokens) for row in rows if row.running)
        nodes, every, taken = [0] * self.batch, torch.arange(self.batch, device=device), 0
        while True:
            at = torch.tensor(nodes, device=device)
            picked = logits[every, at]
            picked[[not alive for alive in live]] = 0.0
            if any(children):
                # NaN may come from another node of the row's tree (`Trees.verify_commit`): the walk ends before it, and
                # at the root all rows begin again with roots alone.
                nan = picked.amax(-1).isnan().tolist()
                if any(alive and bad and below for alive, bad, below in zip(live, nan, children, strict=True)):
                    if not taken:
                        chosen[live, 0] = INVALID
                    return chosen.to(device)
            scores = picked
            if self.processors is not None:
                with self._unwritten("a logits processor"):
                    seen = self.ids[:, : self.width + self.processed]
                    found = self.processors(seen, picked.clone().to(seen.device))
                scores = checked("scores", found, picked).to(device)
            own = None if noise is None else noise.at_nodes(at)
            tokens = ops.choose(scores[:, None], warping, own)[:, 0].tolist()
            self._keep(ops, picked, scores, warping)
            shown = [
                token if alive and token != INVALID else self.pad for alive, token in zip(live, tokens, strict=True)
            ]
            for row, (node, token) in enumerate(zip(nodes, tokens, strict=True)):
                if live[row]:
                    chosen[row, node] = NO_TOKEN if token == INVALID else token
                    live[row] = token not in self.eos
            self.ids[:, self.width + self.processed] = torch.tensor(shown, device="cpu")
            self.processed, taken = self.processed + 1, taken + 1
            below = zip(children, nodes, tokens, strict=True)
            nodes = [found.get((node, token), -1) for found, node, token in below]
            nodes = [node if alive else 0 for node, alive in zip(nodes, live, strict=True)]
            if taken == left or not any(live) or min(nodes) < 0:
                return chosen.to(device)

    def _keep(self, ops: Backend, logits: torch.Tensor, scores: torch.Tensor, warping: dict | None) -> None:
        place = self.ids.device
        if "logits" in self.kept:
            self.kept["logits"].append(logits.to(place))
        if "scores" in self.kept:
            self.kept["scores"].append((scores.clone() if warping is None else ops.warp(scores, **warping)).to(place))

    @torch.inference_mode(False)
    @torch.no_grad()
    def notify(self, sequences: Sequences, starts: list[int]) -> None:
        """Calls criteria and streamer for the positions that all rows have reached; ends the rows that they stop.

        starts: for each row, the length of its prompt.
        """
        if self.criteria is None and self.streamer is None:
            return
        rows = sequences.rows  # a snapshot, where the state lives on a device
        while any(self.unfinished):
            new = [len(row.tokens) - start for row, start in zip(rows, starts, strict=True)]
            at, longest = self.notified, max(new)
            if at >= longest or any(row.running and count <= at for row, count in zip(rows, new, strict=True)):
                return
            tokens = [
                row.tokens[start + at] if count > at else self.pad
                for row, start, count in zip(rows, starts, new, strict=True)
            ]
            self.ids[:, self.width + at] = torch.tensor(tokens, device="cpu")
            self.notified += 1
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens, device="cpu"))
            if self._stop(sequences, starts, tokens):
                rows = sequences.rows

    def _stop(self, sequences: Sequences, starts: list[int], tokens: list[int]) -> bool:
        """Ends the rows that stop at the last notified position; whether there was any."""
        before, stopped = list(self.unfinished), [False] * self.batch
        if self.criteria is not None:
            scores = tuple(self.kept["scores"][: self.notified]) if "scores" in self.kept else None
            with self._unwritten("a stopping criterion"):
                found = self.criteria(self.ids[:, : self.width + self.notified], scores)
            stopped = checked("stopping criteria", found, self.ids[:, 0]).tolist()
        for row, (token, stop) in enumerate(zip(tokens, stopped, strict=True)):
            ended = stop or token in self.eos
            if ended and self.unfinished[row]:
                self.unfinished[row] = False
                if self.pads:
                    sequences.stop(row, starts[row] + self.notified)
        if not any(self.unfinished):
            for row, start in enumerate(starts):
                sequences.stop(row, start + self.notified)
        return before != self.unfinished

    @contextmanager
    def _unwritten(self, who: str) -> Iterator[None]:
        """Raises ValueError where user code wrote into the ids that it was shown: transformers would go on from them,
        but the passes have read the others."""
        before = self.ids._version
        yield
        if self.ids._version != before:
            raise ValueError(
                f"{who} wrote into input_ids, and tokens that were decoded cannot be changed: work on a copy, "
                "input_ids.clone(), or force a token by its scores"
            )


def checked(what: str, found: object, like: torch.Tensor) -> torch.Tensor:
    """What user code returned. Raises ValueError unless it has the shape of `like`, and scores are numbers."""
    kind = "a floating-point tensor" if what == "scores" else "a tensor"
    got = type(found).__name__
    if isinstance(found, torch.Tensor):
        if found.shape == like.shape and (what != "scores" or found.is_floating_point()):
            return found
        got = f"{list(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
    raise ValueError(f"{what} must be returned as {kind} of shape {list(like.shape)}, got {got}")


@contextmanager
def ended(streamer: Streamer | None) -> Iterator[None]:
    """Ends the stream if the generation fails, because its reader would wait forever otherwise."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            with suppress(Exception):  # its own error may be what failed
                streamer.end()
        raise
