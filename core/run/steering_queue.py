"""How commands get to a running process: a queue in the run folder, and the record of what was applied.

`send` puts a file into RUN/steer, which is there only as long as something is in it: so the running process
looks with one `stat` per update.
"""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError
from core.folders import write_atomically
from core.run.folder import LOCK, newest_manifest, read_config, write_config
from core.run.guard import GuardConfig
from core.run.log import END, METRICS, next_step, read_from, read_log
from core.run.schedule import recorded_schedule
from core.run.steering import RECORD, Record, Steered, apply, parse, settle, steered

QUEUE = "steer"
STEERED, REFUSED = "steered", "not steered"  # the events that answer a command


class Typed(NamedTuple):
    """The commands of one call, as the running process takes them."""

    id: str
    words: list[str]


class Sent(NamedTuple):
    """What the call that sent them knows of them."""

    id: str
    n_commands: int
    offset: int
    """Bytes of metrics.jsonl: the answers come after them."""


class Inbox:
    """The first process's end of the queue of a run that it trains."""

    def __init__(self, out: Path, record: dict[str, Any]):
        """record: of `core.run.folder.run_record`."""
        self._out, self._record, self._queue = out, record, out / QUEUE
        self._name = str(self._queue)
        self._token = (out / LOCK).read_text()

    def waiting(self) -> bool:
        """Whether there may be a command."""
        return os.path.exists(self._name)  # noqa: PTH110 - at every update; a Path takes several times as long

    def take(self) -> list[Typed]:
        """The commands that came since the last call, in order; those for an earlier process are dropped:
        whoever typed them was told that it ended."""
        taken = []
        for path in sorted(self._queue.glob("*.json")):
            try:
                sent = json.loads(path.read_text(encoding="utf-8"))
                ours, words = sent["run"] == self._token, list(sent["words"])
            except (ValueError, TypeError, KeyError):  # not written by `send`: refused, but no reason to end
                ours, words = True, [path.name]
            path.unlink()
            if ours:
                taken.append(Typed(path.stem, words))
        with contextlib.suppress(OSError):  # another one is just being written
            self._queue.rmdir()
        return taken

    def close(self) -> None:
        """Removes what came too late: whoever typed it is told that the run has ended."""
        if self.waiting():
            self.take()

    def keep(self, records: Sequence[Record], steps: int) -> None:
        """Writes what was applied; `steps`, which is a setting of the whole run, into config.json first."""
        if steps != self._record["run"]["steps"]:
            self._record = self._record | {"run": self._record["run"] | {"steps": steps}}
            write_config(self._out, self._record)
        write_record(self._out, records)


def write_record(out: Path, records: Sequence[Record]) -> None:
    """Writes steering.json, one entry per line; none where nothing was ever steered."""
    path = out / RECORD
    if records or path.exists():
        lines = ",\n".join(f" {json.dumps(record)}" for record in records)
        write_atomically(path, f"[\n{lines}\n]\n" if records else "[]\n")


def read_record(out: Path) -> list[Record] | None:
    """The steering of a run, oldest first; None where its folder has none (it may be in a manifest).

    Raises:
        UserError: the file is damaged.
    """
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [Record(step=int(entry["step"]), command=str(entry["command"])) for entry in records]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged: delete it to resume with the steering that the newest checkpoint records"
        ) from None


def find_record(out: Path) -> list[Record]:
    """The steering of a run: that of its folder, else of its newest checkpoint (it may have grown)."""
    kept = read_record(out)
    if kept is not None:
        return kept
    manifest = newest_manifest(out)
    return list(manifest.steering or []) if manifest else []


def initial_settings(run: dict[str, Any]) -> Steered:
    """The settings that a recorded run began with."""
    optim, steps = recorded_schedule(run)
    given = {name: run[name] for name in ("window", "sigma", "halt_after") if name in run}
    return Steered(optim, GuardConfig(**given), steps)


def holder(out: Path) -> str | None:
    """What names the process that trains into a run folder; None where none does."""
    try:
        with (out / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return lock.read()
    except FileNotFoundError:
        pass
    return None


def send(out: Path, words: Sequence[str]) -> Sent:
    """Checks commands and queues them for the process that trains into `out`.

    Raises:
        UserError: there is no such run, none that trains, or a command cannot be applied.
    """
    commands = parse(words)
    if not commands:
        raise UserError("there is nothing to do: give a command, such as lr=0.5x (--help lists them)")
    config = read_config(out)
    if config is None:
        raise UserError(f"{out} is not a run: give the folder that a training command was given as --out")
    token = holder(out)
    if token is None:
        if any(row["what"] == END for row in read_log(out, "event")):
            raise UserError(f"the run in {out} has finished: there is nothing to steer")
        raise UserError(
            f"no process trains the run in {out}: start it again and steer it then, or change a setting at "
            "its start (--lr 3e-4 --allow-change lr)"
        )
    step, start = next_step(out), initial_settings(config["run"])
    now = steered(start, find_record(out), step)
    for command in commands:
        now = apply(now, settle(command, now, step))
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    log = out / METRICS
    sent = Sent(name, len(commands), log.stat().st_size if log.is_file() else 0)
    text = json.dumps({"run": token, "words": list(words)})
    while True:
        with contextlib.suppress(FileNotFoundError):  # the running process has just removed the empty queue
            write_atomically(out / QUEUE / f"{name}.json", text)
            return sent


def answers(out: Path, sent: Sent, seconds: float) -> list[dict[str, Any]]:
    """What the log says of the commands, one event for each that the run has taken, after `seconds` at the
    latest, or when the run has ended."""
    deadline = time.monotonic() + seconds
    while True:
        ended = holder(out) is None
        found = [row for row in read_from(out, sent.offset) if row.get("id") == sent.id]
        if len(found) == sent.n_commands or ended or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
