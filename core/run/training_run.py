"""A training run around its loop: what both trainers know of it, where it starts, and its log."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from core.checkpoint.manifest import CHANGE, Manifest, load_manifest
from core.checkpoint.steps import find_start, leave_newer, step_path
from core.errors import UserError
from core.run import changes
from core.run.engine import Engine, LoadedBatch
from core.run.folder import recorded_run
from core.run.interrupt import Interrupt
from core.run.log import END, NoLog, RunLog, read_log
from core.run.loop import Loop
from core.run.profiling import require_among
from core.run.schedule import require_continuous
from core.run.settings import TrainingSettings
from core.run.steering import Record, resumed
from core.run.steering_queue import Inbox, read_record, write_record
from core.tokenizer import Tokenizer


class TrainingRun:
    """What is trained and how long; the descriptions of a run in train_tpu and port_torch extend it."""

    config: TrainingSettings
    defaults: TrainingSettings
    """Those of the command, which older records that lack one had."""
    out: Path
    record: dict[str, Any]
    """What config.json and the manifests say: `core.run.folder.run_record`."""
    steps: int
    """Updates that the schedule is for."""
    prompts: list[list[int]]
    """Ids to sample from."""
    tokenizer: Tokenizer

    @property
    def end(self) -> int:
        """Updates after which to stop: `steps`, or fewer."""
        return self.steps if self.config.stop_at is None else min(self.steps, self.config.stop_at)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.out / "checkpoints"

    def new_manifest(self, **more: Any) -> Manifest:
        """The manifest of the run before its first update; more: fields that are not the default."""
        record = self.record
        return Manifest(
            kind="train", step=0, sequences=0, tokens=0, config={k: record[k] for k in ("model", "run")},
            tokenizer=record["tokenizer"],
            data={name: value for name, value in record["data"].items() if name != "path"} | {"cursor": 0},
            chat_template=record.get("chat_template"), **more,
        )  # fmt: skip

    def find_start(self, group: Any, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to resume from, the same one in every process; None for a new run.

        group: the processes, with `in_turn` and `require_equal`: core.processes or PyTorch's `Distributed`.
        """

        def check(start: Manifest) -> None:
            require_continuous(start.config["run"], self.record["run"], start.step, self.out)

        folder, config = self.checkpoints, self.config
        step_dir = group.in_turn(lambda: find_start(folder, config.from_step, config.fallback, check, say))
        text = load_manifest(step_dir).to_json() if step_dir else ""
        group.require_equal(text, f"checkpoints in {folder}")
        return step_dir

    def resume(self, new: Manifest, old: Manifest) -> Manifest:
        """The manifest `new` of this run as it continues from the checkpoint of `old`.

        Its `steering` is all that the run's folder has: what comes at later steps is applied there again,
        but after --from-step, which goes back to change what followed.
        """
        kept = None if self.config.from_step is not None else read_record(self.out)
        settings = (manifest.config["run"] for manifest in (old, new))
        steering = resumed(old.steering or [], kept, *settings, old.step)
        return dataclasses.replace(new.resumed_from(old), steering=steering)

    def changed(self, old: Manifest, steering: list[Record]) -> changes.Difference:
        """What this start changes of the settings with which the checkpoint of `old` was made."""
        return changes.difference(recorded_run(old), self.record, self.defaults, steering, old.step)

    def how_resumed(self, old: Manifest, new: Manifest) -> str:
        """Where the run continues from, in words.

        Args:
            old: of the checkpoint.
            new: what `resume` makes of it.
        """
        at = f"{self.out} at step {old.step} ({old.sequences:,} sequences read)"
        steered = ", ".join(f"{record['command']} at step {record['step']}" for record in new.steering or [])
        steered = f"; steered: {steered}" if steered else ""
        changed = changes.describe(self.changed(old, new.steering or []))
        changed = f"; from here on with {changed}" if changed else ""
        if old.engine == new.engine:
            return f"resuming {at}{changed}{steered}"
        masks = "; dropout draws other masks than there" if self.record["model"]["dropout"] else ""
        return f"resuming in {new.engine} {at}, which {old.engine} wrote{masks}{changed}{steered}"

    def leave_newer(self, say: Callable[[str], None]) -> None:
        """Renames the checkpoints after --from-step, if it is given; to be called by the first process."""
        if self.config.from_step is not None:
            for left in leave_newer(self.checkpoints, self.config.from_step):
                say(f"a newer checkpoint is left, as {left}")

    def require_same_origin(self, old: Manifest, lineage: list[dict[str, Any]]) -> None:
        """Refuses to resume from the checkpoint of `old` on other weights than those that the run began with.

        lineage: what a run would have that began with those that are given now.
        """
        began = [entry for entry in old.lineage if entry["operation"] != CHANGE]
        before, now = (entries[-1] if entries else {} for entries in (began, lineage))
        if before.get("sha256") != now.get("sha256"):
            where = f": give {before['path']} as it was then" if "path" in before else ""
            raise UserError(
                f"the run in {self.out} was not started from the weights that are given now{where}, or "
                "another --out"
            )

    def require_profile(self, step: int) -> None:
        """Refuses a --profile of updates that a start at `step` does not make."""
        if self.config.profile is not None:
            require_among(self.config.profile, step, self.end)

    def is_finished(self, step: int) -> bool:
        """Whether the run, now at `step`, has made all its updates and logged its end.

        Raises:
            UserError: it has made more than are asked for.
        """
        if step > self.steps:
            raise UserError(
                f"the run in {self.out} is at step {step} already, beyond the {self.steps} steps asked for: "
                "resume it without them, or give another --out"
            )
        return step == self.steps and any(row["what"] == END for row in read_log(self.out, "event"))


def run_loop(
    run: TrainingRun,
    engine: Engine,
    batches: Iterator[LoadedBatch],
    manifest: Manifest,
    *,
    interrupt: Interrupt,
    console: Console,
    first: bool,
    how: str,
    **event: Any,
) -> int:
    """Runs the loop with the log of the run folder; returns its exit code.

    Args:
        engine, batches, manifest, interrupt, console: as `Loop` has them.
        first: whether this process is the first of the run, which alone writes the log.
        how: where the state comes from. The log begins with it, the engine's device, what a resume changes
            and `event`.
    """
    log = RunLog(run.out, manifest.step) if first else NoLog()
    steering = manifest.steering
    if steering is None:  # at its first step; a process that was killed before it saved may have been steered
        steering = read_record(run.out) or []
    inbox = Inbox(run.out, run.record) if first else None
    if first:
        write_record(run.out, steering)
    with contextlib.closing(log), contextlib.closing(inbox) if inbox else contextlib.nullcontext():
        if log.notice:
            console.print(log.notice, highlight=False)
        device = engine.device
        if first and (step_dir := step_path(run.checkpoints, manifest.step)).is_dir():
            event[changes.FIELD] = run.changed(load_manifest(step_dir), steering)
        log.write(manifest.step, "event", what=how, device=device.kind, n=device.n, **event)
        return Loop(
            settings=run.config,
            engine=engine,
            batches=batches,
            manifest=manifest,
            checkpoints=run.checkpoints,
            steps=run.steps,
            end=run.end,
            prompts=run.prompts,
            tokenizer=run.tokenizer,
            log=log,
            console=console,
            interrupt=interrupt,
            steering=steering,
            inbox=inbox,
        ).run()
