"""`python -m stacking.advise RUN`: is it time to grow? Measured at a checkpoint of an undecayed run.

Two runs are forked off the checkpoint. One trains the model on as it is, the other one grows it first; both
read on from the run's place in the data, spend the same FLOPs, and decay in their last half. Then they are
compared on held-out text. Each is a process of its own, as is the growth; what is there already is not done
again. The run itself is only read, but for the answer that is kept in its advice.json.
"""

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import cli
from core.checkpoint.steps import step_path
from core.console import make_console
from core.data.batches import Data
from core.errors import UserError, noted, run_command
from core.folders import require_place, write_atomically
from core.run.data import is_ready
from core.run.folder import LOCK, lock_folder
from stacking.advise.arms import jobs, keep_checkpoint, require_compared
from stacking.advise.config import AdviseConfig
from stacking.advise.question import Question, open_data, open_questions
from stacking.advise.report import (
    Answer,
    describe_answer,
    describe_cost,
    describe_question,
    make_answer,
    next_command,
    record,
)
from stacking.advise.verdict import ADVICE, COVERS, keep_advice
from stacking.jobs import run_jobs

QUESTION = "question.json"  # what an output folder was begun for
ASKED = ("op", "factor", "layers", "budget")  # settings that make another question
TABLE = "table.md"


def main() -> int:
    """Runs the command; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the arms are told, too
    config = cli.parse(AdviseConfig, prog="python -m stacking.advise")
    console = make_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    run = config.run if config.run.name else config.run.resolve()
    out = run.with_name(f"{run.name}-advice") if config.out is None else config.out
    asked = {name: getattr(config, name) for name in ASKED}
    require_own(out, asked)
    questions = open_questions(config, out)
    for question in questions:
        say("\n".join(describe_question(question)))
    say(describe_cost(questions))
    if config.dry_run:
        say(f"dry run: {out} was not written")
        with noted(say):
            for question in questions:
                if is_ready(question.settings.data):
                    open_data(question, config.heldout)
        return 0
    opened = [open_data(question, config.heldout) for question in questions]
    with lock_folder(out):
        write_atomically(out / QUESTION, json.dumps(asked) + "\n")
        for question in questions:
            keep_checkpoint(question)
        todo = [job for question in questions for job in jobs(question, config)]
        run_jobs(todo, out, 1, (), console)
        for question in questions:
            require_compared(question)
        answers = [
            measure(question, *data, config.windows) for question, data in zip(questions, opened, strict=True)
        ]
        report(answers, config, out, say)
    return 0


def require_own(out: Path, asked: dict[str, Any]) -> None:
    """Refuses an output folder that is something else, or was begun for another question."""
    require_place(out)
    path = out / QUESTION
    if not path.is_file():
        if out.is_dir() and any(entry.name != LOCK for entry in out.iterdir()):
            raise UserError(
                f"{out} is not empty and not a folder of stacking.advise: give another one with --out"
            )
        return
    try:
        begun = {name: json.loads(path.read_text(encoding="utf-8"))[name] for name in asked}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: remove {out}, or give another --out") from None
    for name, value in asked.items():
        if begun[name] != value:
            given = {None: "without"}.get(begun[name], f"with --{name} {begun[name]}, not")
            raise UserError(
                f"{out} was begun {given} --{name} {value}: give the same again, or another --out"
            )


def measure(question: Question, dataset: Data, heldout: str, windows: int) -> Answer:
    """Scores both arms, which have been trained."""
    from stacking.advise.heldout import score_windows  # slow: JAX

    scores = [
        score_windows(
            step_path(question.out(arm) / "checkpoints", question.end(arm)),
            arm.model,
            dataset,
            heldout,
            windows,
        )
        for arm in question.arms
    ]
    return make_answer(question, heldout, dataset.fingerprint, scores)


def report(answers: list[Answer], config: AdviseConfig, out: Path, say: Callable[[str], None]) -> None:
    """Prints the answers, and writes them next to the arms and into the run folder."""
    text = "\n\n".join("\n".join(describe_answer(answer)) for answer in answers)
    text += f"\n\nWhat this says: {COVERS}."
    records = [record(answer, config) for answer in answers]
    write_atomically(out / TABLE, text + "\n")
    write_atomically(out / ADVICE, json.dumps(records, indent=1) + "\n")
    for entry in records:
        keep_advice(config.run, entry)
    say(f"\n{text}\n\ntable: {out / TABLE}; all figures: {out / ADVICE}; kept in {config.run / ADVICE}")
    for command in dict.fromkeys(next_command(answer, config) for answer in answers):
        if command:
            say(f"next: {command}")


if __name__ == "__main__":
    run_command(main)
