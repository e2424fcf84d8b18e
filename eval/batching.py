"""Token sequences with a part to score, laid out in batches of a few shapes.

Rows are sorted by length and padded on the right to a few widths, so that little is computed for nothing and
nothing is compiled twice. A batch holds as many rows of its width as its budget of tokens allows. What is to
be scored is a list of places in the batch: the head, a third of a small model's work, is applied there alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from core.errors import UserError

# Where a shape is compiled: few of them, closer where TruthfulQA's prompt puts most of the work.
WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Tokens that a batch holds on each device, multiples of the widths; a CPU works best in its caches.
BUDGET, CPU_BUDGET = 12_288, 3072


class Row(NamedTuple):
    """One sequence, of which the last predictions are scored."""

    inputs: Sequence[int]
    """What the model sees; it predicts the token after each."""
    targets: Sequence[int]
    """The tokens after the last len(targets) inputs."""


class Batch(NamedTuple):
    """Rows as arrays; N places are scored."""

    tokens: Int[np.ndarray, "B S"]
    place: Int[np.ndarray, " N"]
    """Where: row * S + position."""
    target: Int[np.ndarray, " N"]
    row: Int[np.ndarray, " N"]
    """Index, among all rows, of the row that each place belongs to."""


class Scores(NamedTuple):
    """Of every place of a batch."""

    logprob: Float[np.ndarray, " N"]
    """Of the target, in nats."""
    greedy: Bool[np.ndarray, " N"]
    """Whether the target is the likeliest token."""


class Backend(Protocol):
    """A model that scores batches: eval.flax_backend or eval.torch_backend."""

    context: int
    budget: int
    """Tokens a batch may hold."""
    compiled: bool
    """Whether a new shape costs time, so that rows are padded to one of WIDTHS."""
    n_devices: int
    """A batch has a multiple of this many rows."""

    def start(self, batch: Batch) -> Any:
        """Begins the work on a batch; gives what `finish` needs. Does not wait."""

    def finish(self, started: Any) -> Scores:
        """Waits for the result."""

    def stream(self, prompts: list[list[int]], sampling, max_new_tokens: int, eos: int | None):
        """Tokens after the prompts, step by step (see core.generation.Generator.stream)."""


def batches(
    rows: Sequence[Row], context: int, budget: int, n_devices: int, compiled: bool = True
) -> Iterator[Batch]:
    """All rows in batches, the longest first: what does not fit into memory says so at once.

    Where a shape is compiled, the last batch of a width is filled up with rows that are not scored.
    """
    widths = [width for width in WIDTHS if width < context] + [context]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].inputs))
    start = 0
    while start < len(order):
        longest = len(rows[order[start]].inputs)
        width = next(w for w in widths if w >= longest) if compiled else longest
        n_rows = max(1, budget // width // n_devices) * n_devices
        chosen = order[start : start + n_rows]
        if not compiled:
            n_rows = -(-len(chosen) // n_devices) * n_devices
        tokens = np.zeros((n_rows, width), np.int32)
        place, target, row = [], [], []
        for line, index in enumerate(chosen):
            inputs, targets = rows[index]
            if not 0 < len(targets) <= len(inputs) <= width:  # else other tokens would be scored
                raise ValueError(f"{len(targets)} targets of {len(inputs)} tokens in a row of {width}")
            tokens[line, : len(inputs)] = inputs
            first = line * width + len(inputs) - len(targets)
            place.append(np.arange(first, first + len(targets)))
            target.append(np.asarray(targets))
            row.append(np.full(len(targets), index))
        joined = (np.concatenate(parts).astype(np.int32) for parts in (place, target, row))
        yield Batch(tokens, *joined)
        start += len(chosen)


def score_rows(
    backend: Backend, rows: Sequence[Row], report: Callable[[int], None] = lambda tokens: None
) -> tuple[Float[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
    """Summed log-probability of each row's targets, in nats and float64; and whether all are the likeliest.

    report: is told the tokens of every batch that is done.

    Raises:
        UserError: a log-probability is not finite.
    """
    total, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    waiting: tuple[Batch, Any] | None = None  # one batch is laid out while the device works on another

    def collect(batch: Batch, started: Any) -> None:
        scores = backend.finish(started)
        if not np.isfinite(scores.logprob).all():
            raise UserError("the model gives log-probabilities that are not finite: its weights are unusable")
        np.add.at(total, batch.row, scores.logprob.astype(np.float64))
        np.logical_and.at(greedy, batch.row, scores.greedy)
        report(sum(len(rows[index].inputs) for index in np.unique(batch.row)))

    for batch in batches(rows, backend.context, backend.budget, backend.n_devices, backend.compiled):
        started = backend.start(batch)
        if waiting:
            collect(*waiting)
        waiting = batch, started
    if waiting:
        collect(*waiting)
    return total, greedy


def chunks(n: int, size: int) -> Iterator[slice]:
    """[0, n) in parts of `size`."""
    return (slice(i * size, min(n, (i + 1) * size)) for i in range(math.ceil(n / size)))
