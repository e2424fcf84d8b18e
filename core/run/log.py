"""The log of a run: metrics.jsonl (every update), watch.jsonl (every watched one), TensorBoard, samples.txt.

A log never stops a run: lines that cannot be read are set aside, once and with a notice, and a missing file
is begun again.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.folders import write_atomically
from core.run.board import Board

METRICS = "metrics.jsonl"
END = "end"  # the event that a finished run logs last
HALT = "halt"  # that of one which the guard ended
SAMPLES = "samples.txt"
EVENTS = "tensorboard"  # the folder of its events
LAST_LINES = 1 << 18  # bytes of a log that hold its newest updates
WATCHED = "watch.jsonl"  # what core/run/watching.py has of some updates
WATCH = "watch"  # the kind of its lines
CARRIED = "before_growth"
"""Key of the lines that a grown run's log has from the run it was grown from; the step of the growth."""
MEASURED = ("eval", "task", "sample")
"""Kinds of lines on the state before update `step`, which a checkpoint of that step holds."""
READ = {
    "train": ("tokens", "loss", "nll"),
    "eval": ("tokens", "split", "nll", "bits_per_byte"),
    "sample": ("texts",),
    "event": ("what",),
}
"""Fields that plots and commands read of a kind of line; a line that lacks one of them is damaged."""


class RunLog:
    """Appends to a run folder's metrics.jsonl, watch.jsonl, TensorBoard events and samples.txt.

    A line of metrics.jsonl is an object with "step" and "kind": "train" (one per update), "eval", "task",
    "sample", "skip" (an update that was not applied) or "event" (start; resume, with the settings that it
    `changed`, see core/run/changes.py; halt; end).
    """

    def __init__(self, folder: Path, resume_step: int):
        """Opens the log; what an earlier process logged from `resume_step` on is dropped: it comes again, but
        for what `keep` is told of."""
        self.folder = folder
        self.path = folder / METRICS
        rows = [row for _, row in _read_lines(self.path) if row and row["step"] == resume_step]
        self._dropped = [row for row in rows if row["kind"] in MEASURED and CARRIED not in row]
        notices = (_open_again(self.path, resume_step), _open_again(folder / WATCHED, resume_step))
        self.notice = "; ".join(notice for notice in notices if notice) or None
        """What is to be said of an earlier log that was damaged or is gone; None otherwise."""
        self._file = self.path.open("a", encoding="utf-8")
        self._board = Board(folder / EVENTS, resume_step)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One line; finite numbers also go to TensorBoard as kind/name (eval/split/name), others become
        strings."""
        line = {"step": step, "kind": kind} | {k: _jsonable(v) for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        tag = "/".join([kind, *([values["split"]] if kind == "eval" else [])])
        numbers = {f"{tag}/{k}": v for k, v in values.items() if isinstance(v, float | int)}
        self._board.scalars(step, {tag: value for tag, value in numbers.items() if math.isfinite(value)})

    def keep(self, *kinds: str) -> None:
        """Logs again what an earlier process logged at the step of the resume, of these kinds of `MEASURED`:
        they tell of the same state, and are not due there any more."""
        for row in self._dropped:
            values = {name: value for name, value in row.items() if name not in ("step", "kind")}
            if row["kind"] in kinds and row["kind"] == "sample":
                self.sample(row["step"], **values)
            elif row["kind"] in kinds:
                self.write(row["step"], row["kind"], **values)

    def watch(self, step: int, record: dict[str, Any]) -> None:
        """A line of watch.jsonl, of `core.run.watching.make_record`."""
        with (self.folder / WATCHED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": WATCH} | record) + "\n")

    def sample(self, step: int, texts: list[str]) -> None:
        """Logs samples; samples.txt is written again from all that metrics.jsonl holds."""
        self.write(step, "sample", texts=texts)
        self._board.text(step, "samples", "\n\n".join(texts))
        parts = []
        for row in read_log(self.folder, "sample"):
            parts += [f"===== step {row['step']} =====", *(f"{text}\n-----" for text in row["texts"]), ""]
        (self.folder / SAMPLES).write_text("\n".join(parts), encoding="utf-8")

    def close(self) -> None:
        """Writes out what is buffered."""
        try:
            self._file.close()
        finally:  # on a full disk both fail, and both must be closed: Python reports a file that is not
            self._board.close()


class NoLog:
    """The log of a process that is not the first of several: nothing."""

    notice = None

    def write(self, step: int, kind: str, **values: Any) -> None: ...

    def keep(self, *kinds: str) -> None: ...

    def watch(self, step: int, record: dict[str, Any]) -> None: ...

    def sample(self, step: int, texts: list[str]) -> None: ...

    def close(self) -> None: ...


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run folder's metrics.jsonl, in order; none where there is no such file.

    Lines that cannot be read are left out: `RunLog` names them when the run resumes.
    """
    return [row for _, row in _read_lines(folder / METRICS) if row and row["kind"] == kind]


def next_step(folder: Path) -> int:
    """The update that comes after the newest one in a run's log; 0 before the first."""
    path = folder / METRICS
    size = path.stat().st_size if path.is_file() else 0
    rows = read_from(folder, max(0, size - LAST_LINES))
    return max((row["step"] + 1 for row in rows if row["kind"] == "train"), default=0)


def read_from(folder: Path, offset: int) -> list[dict[str, Any]]:
    """The lines that begin after `offset` bytes of a run's log, of every kind."""
    path = folder / METRICS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(offset if offset <= path.stat().st_size else 0)  # shorter: a resume has begun it again
        return [row for _, row in parse_lines(file.read()) if row]


def carry_log(source: Path, target: Path, step: int) -> None:
    """Gives the run folder `target` the history of the run in `source` up to `step`, where it was grown.

    The evaluation at that step itself is carried too: it is the loss just before. Every carried line says at
    which step the model grew, and so is never taken for the new run's own.
    """
    if not (source / METRICS).is_file():
        return
    lines = []
    for kind in ("train", "eval", "task", "sample", "skip"):
        for row in read_log(source, kind):
            if row["step"] < step or (kind in ("eval", "task") and row["step"] == step):
                lines.append({CARRIED: step} | row)
    lines.sort(key=lambda row: row["step"])
    (target / METRICS).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line that ends in a newline, with its object: None if it cannot be read as a line of a log.

    A last line without an end is what a killed process left: it is none.
    """
    return parse_lines(path.read_bytes() if path.is_file() else b"")


def parse_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """As `_read_lines`, of the content of a file."""
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):  # not UTF-8, or not JSON
            row = None
        yield line + b"\n", row if _is_whole(row) else None


def _is_whole(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return False
    for name in READ.get(row["kind"], ()):
        value = row.get(name)
        if name == "texts":
            fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
        elif name in ("split", "what"):
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, int | float) or value in ("nan", "inf", "-inf")
        if not fits:
            return False
    return True


def _open_again(path: Path, resume_step: int) -> str | None:
    """Drops the lines from `resume_step` on and sets damaged ones aside; returns what is to be said of it."""
    if not path.is_file():
        if resume_step == 0 or path.name != METRICS:
            return None
        return f"{path} is missing: the loss curve begins at step {resume_step}; training is not affected"
    kept, damaged = [], []
    for line, row in _read_lines(path):
        if row is None:
            damaged.append(line)
        elif row["step"] < resume_step or CARRIED in row:
            kept.append(line.decode())
    aside = path.with_suffix(".damaged.jsonl")
    if damaged:
        with aside.open("ab") as file:
            file.writelines(damaged)
    write_atomically(path, "".join(kept))
    if not damaged:
        return None
    picture = "the loss curve lacks" if path.name == METRICS else "train_tpu.inspect lacks"
    return (
        f"{len(damaged)} lines of {path} cannot be read and were moved to {aside.name} next to it; {picture} "
        "them, training is not affected"
    )


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
