"""What a run folder says of an update: the checkpoint before it, its settings, its line of the log, its data.

Nothing here is written, and nothing needs JAX: what cannot be replayed is refused before anything slow.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint.manifest import CHANGE, JAX, Manifest, load_manifest
from core.checkpoint.steps import list_steps, step_path
from core.config import ModelConfig
from core.data.batches import Data
from core.data.mixture_options import data_paths
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.run.changes import FIELD, Change, describe, difference, taken_back
from core.run.data import open_recorded_data
from core.run.folder import command_of, data_name, newest_manifest, recorded_run, require_run
from core.run.guard import GuardConfig
from core.run.log import CARRIED, read_log
from core.run.other_engine import ENGINE_SETTINGS, KEPT, engine_of, settings_for
from core.run.phases import phase_limits
from core.run.schedule import SHAPE
from core.run.settings import unflatten
from core.run.steering import Record, Steered, steered, steered_length
from core.run.steering_queue import find_record
from core.tokenizer import Tokenizer, load_tokenizer_of
from train_tpu.config import RunConfig

BY_UPDATE = frozenset((*SHAPE, "lr", "sigma", "halt_after"))
"""Settings that the compiled step takes with every update: an update has its own, whatever the others had."""


class Start(NamedTuple):
    """A start of the run, as its log has it: what made the updates from there on."""

    step: int
    kind: str
    """Of its devices."""
    n: int
    mesh: str | None = None
    """None: PyTorch, or an older log."""
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An update of a run, as its folder describes it."""

    folder: Path
    step: int
    """The update (0-based)."""
    record: dict[str, Any]
    """What config.json said when the update was made: `run`, `model`, `tokenizer`, `data`; its `steps` are
    those that the run was steered to after it, if it was."""
    config: RunConfig
    """The same settings as JAX has them."""
    start: Path | None
    """The nearest checkpoint that holds a state before the update; None: the run's own start."""
    start_manifest: Manifest | None
    source: Path | None
    """The checkpoint whose parameters the run began with; None: random ones, or `start` is given."""
    lines: dict[int, dict[str, Any]]
    """Lines of the log by update, from the first one to make again on."""
    steering: list[Record]
    """What was changed while it trained."""
    starts: list[Start]
    """Of the run, in order."""
    changes: list[Change]
    """Of its settings, in order, from the first update to make again on."""

    @property
    def first(self) -> int:
        """The first update to make again."""
        return self.start_manifest.step if self.start_manifest else 0

    @property
    def cursor(self) -> int:
        """Index of its batch's first sequence."""
        return self.start_manifest.sequences if self.start_manifest else 0

    def start_of(self, step: int) -> Start | None:
        """The start of the run that made an update; None: the log does not say."""
        return next((start for start in reversed(self.starts) if start.step <= step), None)

    @property
    def mesh(self) -> str | None:
        """The mesh that made the update, which may be another than the run's newest."""
        start = self.start_of(self.step)
        return start.mesh if start and start.mesh else self.config.mesh

    @property
    def model(self) -> ModelConfig:
        """The model that was trained."""
        return ModelConfig(**self.record["model"])

    @property
    def engine(self) -> str:
        """Which engine made the update."""
        return engine_of(self.record["run"])

    @property
    def steps(self) -> int:
        """Updates that the run's schedule is for."""
        return self.record["run"]["steps"]

    def settings(self, step: int) -> Steered:
        """Those of an update, as it was steered."""
        config, steps = self.config, self.steps
        if later := [change for change in self.changes if step < change.step <= self.step]:
            record = taken_back(self.record, later)
            config, steps = unflatten(settings_for(JAX, record), RunConfig), record["run"]["steps"]
        start = Steered(config.optim, config.guard, steps)
        return steered(start, self.steering, step)

    def limits(self, guard: GuardConfig, first: int) -> GuardConfig:
        """The guard's limits for the batch whose first sequence has the index `first`."""
        return phase_limits(guard, self.record["data"], first, self.config.batch)

    def lr(self, step: int) -> float:
        """The rate of an update: what the log has, since a resume may have changed it, else what it was."""
        line = self.lines.get(step)
        return line["lr"] if line and "lr" in line else self.settings(step).lr(step)

    def notes(self, until: int) -> Iterator[str]:
        """Why the updates up to `until` may differ from the run's, where it is known before they are made."""
        for change in self.changes:
            if not (describe(change.difference) and change.may_lie_between(self.first, until)):
                continue
            if not change.lies_between(self.first, until):
                yield (
                    f"settings changed {change.where}, which this older log does not say, so equality cannot "
                    f"be expected: {describe(change.difference)}"
                )
            elif changed := describe(change.difference, BY_UPDATE):  # what changes an update is refused
                yield f"the run changed {change.where}: {changed}; that sums in another order"

    def cost(self, until: int) -> str:
        """What making the updates up to `until` again takes, in words."""
        n = until - self.first + 1
        where = f"checkpoint {self.first}" if self.start else "the start of the run"
        tokens = n * self.config.batch * self.model.context
        rates = [line["tokens_per_second"] for line in self.lines.values() if line.get("tokens_per_second")]
        seconds = (
            f", about {tokens / rates[-1]:,.0f} s at the run's {rates[-1]:,.0f} tokens/s" if rates else ""
        )
        return f"from {where}: {n:,} update{'s' * (n > 1)} to make again{seconds}, and compilation"


def open_recorded(folder: Path, step: int) -> Recorded:
    """What the run in `folder` says of update `step`.

    Raises:
        UserError: there is no run, no such update, or nothing left to make it from.
    """
    checkpoints = folder / "checkpoints"
    if not (folder / "config.json").is_file():
        require_kind(folder, "replay", Kind.CHECKPOINT)
    newest = require_run(folder)
    if "preset" not in newest["run"]:
        made_by = command_of(newest)
        raise UserError(f"the run in {folder} is of {made_by}: only runs that pretrain are replayed")
    lines = {row["step"]: row for row in read_log(folder, "train") if CARRIED not in row}
    made = max([step + 1 for step in lines] + list_steps(checkpoints), default=0)
    manifest = newest_manifest(folder)
    grown = manifest.last_growth if manifest else None
    least = grown["step"] if grown else 0
    if not least <= step < made:
        there = f"has made updates {least} to {made - 1}" if made > least else "has made no update yet"
        since = f" since it was grown at step {least}" if grown else ""
        raise UserError(f"the run in {folder} {there}{since}: --step {step} is not among them")
    steering = find_record(folder)
    earlier = [saved for saved in list_steps(checkpoints) if saved <= step]
    start = step_path(checkpoints, earlier[-1]) if earlier else None
    start_manifest = load_manifest(start) if start else None
    first = start_manifest.step if start_manifest else 0
    changes = _changes(folder, newest, start_manifest, steering, made)
    for change in changes:
        changed = describe(change.difference, BY_UPDATE | ENGINE_SETTINGS)
        if changed and change.lies_between(first, step):
            raise UserError(
                f"the settings of the run in {folder} changed {change.where}, and no checkpoint from there "
                f"to update {step} is left: {changed}; replay an update up to {change.step - 1}, or one "
                "after a newer checkpoint"
            )
    record = _record_at(folder, newest, step, steering, changes)
    config = unflatten(settings_for(JAX, record), RunConfig)
    source = None if start else _source(folder, record, manifest, step)
    context = record["model"]["context"]
    _require_same_batches(folder, config.batch * context, start_manifest, lines.get(step), step)
    recorded = Recorded(
        folder, step, record, config, start, start_manifest, source,
        {at: line for at, line in lines.items() if at >= first}, steering, _starts(folder), changes,
    )  # fmt: skip
    if recorded.settings(step).leaves_out(step):
        raise UserError(f"update {step} of the run in {folder} was left out, as asked: give another --step")
    return recorded


def _record_at(
    folder: Path, newest: dict[str, Any], step: int, steering: Sequence[Record], changes: Sequence[Change]
) -> dict[str, Any]:
    """The record under which an update was made: that of the next checkpoint, else the newest, without what
    changed before that and after the update.

    Its length is that which the run was steered to since: it changes the rate of no update that was made, but
    those of updates to come, which a branch trains, too (`core.run.steering.settle`).
    """
    later = next((saved for saved in list_steps(folder / "checkpoints") if saved > step), None)
    following = [change for change in changes if change.step > step]
    if later is None:
        return taken_back(newest, following)
    manifest = load_manifest(step_path(folder / "checkpoints", later))
    record = newest | recorded_run(manifest)
    record = taken_back(record, [change for change in following if change.step < later])
    if engine_of(record["run"]) != engine_of(newest["run"]):
        record.pop(KEPT, None)  # it is of the engine that made this update
    other = (change.step for change in following if "steps" in change.difference.get("run", {}))
    end = next(other, math.inf)
    steps = steered_length([steered for steered in steering if steered["step"] < end], later)
    return record if steps is None else record | {"run": record["run"] | {"steps": steps}}


def _changes(
    folder: Path, newest: dict[str, Any], start: Manifest | None, steering: Sequence[Record], made: int
) -> list[Change]:
    """Where settings changed since the checkpoint `start`; `made` updates have been made.

    A log says it. One that is older does not: then the records of its checkpoints tell what has changed from
    one to the next, at one of the starts between them.
    """
    starts = [row for row in read_log(folder, "event") if "device" in row]
    changes = [Change(row["step"], row[FIELD], row["step"]) for row in starts if row.get(FIELD)]
    silent = {row["step"] for row in starts if FIELD not in row} - {0}
    saved = [(start.step, recorded_run(start))] if start else []
    for step in list_steps(folder / "checkpoints") if silent else []:
        if not start or step > start.step:
            saved.append((step, recorded_run(load_manifest(step_path(folder / "checkpoints", step)))))
    for (low, old), (high, new) in itertools.pairwise([*saved, (made + 1, newest)]):
        at = sorted(step for step in silent if low <= step < high)
        said = [change for change in changes if low <= change.step < high]
        if at and (found := difference(old, taken_back(new, said), RunConfig(), steering, low)):
            changes.append(Change(at[0], found, at[-1]))
    return sorted(changes, key=lambda change: change.step)


def _source(folder: Path, record: dict[str, Any], manifest: Manifest | None, step: int) -> Path | None:
    """The checkpoint whose parameters a run began with, for one to be replayed from its start."""
    lineage = manifest.lineage if manifest else []
    changed = next((entry["from"] for entry in lineage if entry["operation"] == CHANGE), None)
    gone = f"no checkpoint from before update {step} is left in {folder}"
    given = record["run"].get("init_from")
    if given and (changed or engine_of(record["run"])) != JAX:
        raise UserError(f"{gone}, and PyTorch began with a folder of weights ({given}): replay a later one")
    if manifest and manifest.last_growth:
        raise UserError(f"{gone}, and the one that growth made is gone, too: replay a later update")
    took = [entry["path"] for entry in lineage if entry["operation"] == "init_from"]
    given = took[-1] if took else given
    if given and not Path(given).is_dir():
        raise UserError(
            f"{gone}, and {given}, from whose parameters the run began, is gone: replay a later one"
        )
    return Path(given) if given else None


def _require_same_batches(
    folder: Path, batch: int, start: Manifest | None, line: dict[str, Any] | None, step: int
) -> None:
    """Refuses a stretch in which the batch, of `batch` tokens at its end, was another at its beginning; for
    logs that do not say where it changed."""
    first, tokens = (start.step, start.tokens) if start else (0, 0)
    if line is not None and line["tokens"] != tokens + (step - first) * batch:
        raise UserError(
            f"the batch size of the run in {folder} changed after step {first}, and its log does not say at "
            "which step: replay an update after a newer checkpoint"
        )


def _starts(folder: Path) -> list[Start]:
    events = [row for row in read_log(folder, "event") if "device" in row]
    return [
        Start(row["step"], row["device"], row["n"], row.get("mesh"), row.get("processes", 1))
        for row in events
    ]


def open_tokenizer(recorded: Recorded) -> Tokenizer:
    """The tokenizer of the run."""
    folder, record = recorded.folder, recorded.record
    carriers = (folder, *map(Path, data_paths(record["run"]["data"])))
    return load_tokenizer_of(record["tokenizer"], carriers, f"the run in {folder}")


def open_data(recorded: Recorded, tokenizer: Tokenizer, given: tuple[str, ...]) -> Data:
    """The data that the run was trained on, where it was, or where `given` says that it is now.

    Raises:
        UserError: it is gone, or is not what it was; the path and both hashes are named.
    """
    record, wanted = recorded.record["data"], recorded.record["data"]["fingerprint"]
    data = given or recorded.record["run"]["data"]
    what = f"the data of the run in {recorded.folder} ({data_name(data)}, fingerprint {wanted[:12]})"
    try:
        dataset = open_recorded_data(data, record, tokenizer.name, recorded.model.context)
    except UserError as error:
        raise UserError(f"{what} cannot be opened: {error}; --data names another place") from None
    if dataset.fingerprint != wanted:
        raise UserError(
            f"{what} has changed: its fingerprint is {dataset.fingerprint[:12]} now, so its batches would be "
            "others; give what it was trained on with --data"
        )
    return dataset
