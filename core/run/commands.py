"""Steering in the loop: commands as they come in are checked, logged and recorded, and give the settings."""

import bisect
import collections
import dataclasses
import json
from collections.abc import Callable, Sequence

from core.errors import UserError
from core.run.log import NoLog, RunLog
from core.run.steering import LASTING, Command, Record, Steered, apply, parse, settle, steered
from core.run.steering_queue import REFUSED, STEERED, Inbox, Typed


class Steering:
    """What a run was steered to, and what it is told while it trains."""

    def __init__(
        self, start: Steered, records: Sequence[Record], step: int, inbox: Inbox | None,
        log: RunLog | NoLog, say: Callable[[str], None],
    ):  # fmt: skip
        """
        Args:
            start: the settings that the run began with.
            records: what was steered before, and what comes again at later steps.
            step: the next update.
            inbox: where commands come in; None in a process that is not the first.
        """
        self.records = list(records)
        self.now = steered(start, records, step)
        """The settings of the next update."""
        self._start, self._inbox, self._log, self._say = start, inbox, log, say
        self._again = collections.deque(r for r in records if r["step"] >= step)

    def waiting(self) -> bool:
        """Whether a command has come in here."""
        return self._inbox is not None and self._inbox.waiting()

    def repeat(self, step: int) -> None:
        """Has what an earlier start recorded for update `step` hold from there on."""
        while self._again and self._again[0]["step"] <= step:
            record = self._again.popleft()
            self.now = steered(self._start, self.records, step)
            self._log.write(step, "event", what=STEERED, command=record["command"])

    def obey(
        self,
        step: int,
        share: Callable[[str], str],
        require_possible: Callable[[Command], None],
        act: Callable[[Command], None],
    ) -> None:
        """Takes the commands that have come in, in every process, and applies them before update `step`.

        Args:
            share: gives the first process's text in every process.
            require_possible: raises a UserError where a command cannot be carried out.
            act: carries one out, but for the settings that it changes.
        """
        for typed in json.loads(share(json.dumps(self._inbox.take() if self._inbox else []))):
            typed = Typed(*typed)
            try:
                commands = parse(typed.words)
            except UserError as error:
                self._refuse(step, typed, error)
                continue
            for command in commands:
                try:
                    settled = settle(command, self.now, step)
                    require_possible(command)
                except UserError as error:
                    self._refuse(step, typed, error)
                    continue
                if settled.name in LASTING:  # before the answer: what is answered outlives a kill
                    self._record(step, settled)
                self._log.write(step, "event", what=STEERED, id=typed.id, command=str(settled))
                self._say(f"step {step}: steered: {settled}")
                act(settled)

    def _refuse(self, step: int, typed: Typed, error: UserError) -> None:
        self._log.write(step, "event", what=REFUSED, id=typed.id, why=str(error))
        self._say(f"step {step}: not steered: {error}")

    def _record(self, step: int, command: Command) -> None:
        # Before what an earlier start recorded for later steps: that comes again, on top of this.
        behind = bisect.bisect_right(self.records, step, key=lambda record: record["step"])
        record = Record(step=step, command=str(command))
        self.records = [*self.records[:behind], record, *self.records[behind:]]
        self.now = apply(self.now, command)
        self._start = dataclasses.replace(self._start, steps=self.now.steps)
        if self._inbox:
            self._inbox.keep(self.records, self.now.steps)
