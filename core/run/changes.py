"""Settings that changed between two starts of a run: what differs, in words, in its log, and taken back.

A run folder has one record of settings, that of its newest start. With every resume the log says what it
changed (event field `changed`), so that the settings of any update can be told.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from core import checks
from core.config import ModelConfig
from core.run.other_engine import ENGINE_SETTINGS, engine_of, settings_for
from core.run.settings import AUTOMATIC, FREE_SETTINGS, flatten, resolved
from core.run.steering import Record, steered_length

FIELD = "changed"
"""Of the event that a start logs: section of the record -> name -> [old, new]. Older logs have none."""
Difference = dict[str, dict[str, list[Any]]]
_NAMES_OF_DATA = ("data", "weights", "phases")  # free while they stand for the same windows
_ELSEWHERE = ("mesh", "coordinator", "num_processes", "process_id")  # the event itself has what came of them


class Change(NamedTuple):
    """What a start changed."""

    step: int
    """The first update that it made."""
    difference: Difference
    latest: int
    """`step`; more where an older log leaves open which of several starts it was: then that of the last."""

    @property
    def where(self) -> str:
        """Its place, in words."""
        if self.step == self.latest:
            return f"at step {self.step}"
        return f"somewhere between steps {self.step} and {self.latest}"

    def lies_between(self, first: int, last: int) -> bool:
        """Whether the updates `first` and `last` certainly have different settings."""
        return first < self.step and self.latest <= last

    def may_lie_between(self, first: int, last: int) -> bool:
        """Whether they can have."""
        return first < self.latest and self.step <= last


def difference(
    old: dict[str, Any], new: dict[str, Any], defaults: Any, steering: Sequence[Record], step: int
) -> Difference:
    """What a start at `step` changes of the settings under which the update before it was made.

    Args:
        old, new: records as config.json has them.
        defaults: settings of the command: what `old` lacks, since it is older, had them.
        steering: of the run. A length that it was steered to since `step` is not a change of that start.
    """
    was, now = settings_for(engine_of(new["run"]), old), new["run"]
    free = FREE_SETTINGS.union(_ELSEWHERE)
    if engine_of(old["run"]) != engine_of(now):
        free |= ENGINE_SETTINGS
    other_data = old["data"]["fingerprint"] != new["data"]["fingerprint"]
    if other_data:
        free -= set(_NAMES_OF_DATA)
    if steered_length(steering, step) == now.get("steps"):
        free |= {"steps"}
    was, now = flatten(defaults) | was, flatten(defaults) | now
    before, after = resolved(was), resolved(now)
    names = [name for name in sorted(now) if name not in free and before.get(name) != after[name]]
    names = [name for name in names if name not in AUTOMATIC or was[name] != AUTOMATIC[name]]
    models = (dataclasses.asdict(ModelConfig(**record["model"])) for record in (old, new))
    found = {
        "run": {name: [before.get(name), after[name]] for name in names},
        "model": _differing(*models),
        "data": _differing(old["data"], new["data"]) if other_data else {},
    }
    return {section: changed for section, changed in found.items() if changed}


def _differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    pairs = {name: [old.get(name), new.get(name)] for name in sorted(old.keys() | new.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def named(difference: Difference) -> dict[str, list[Any]]:
    """The settings that changed, as the command line names them: [old, new]."""
    found = dict(difference.get("run", {}))
    if "data" in difference and not found.keys() & set(_NAMES_OF_DATA):  # other content at the same place
        found["data"] = [fingerprint[:12] for fingerprint in difference["data"]["fingerprint"]]
    return found


def describe(difference: Difference, free: Collection[str] = ()) -> str:
    """Every setting but the free ones, with its new and its old value; empty where nothing changed."""
    pairs = ((name, pair) for name, pair in named(difference).items() if name not in free)
    return ", ".join(
        f"{checks.option(name)} {_value(new)} ({_value(old)} before)" for name, (old, new) in pairs
    )


def _value(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def taken_back(record: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The record under which the updates before some changes were made; `record` came of them."""
    for change in reversed(changes):
        for section, pairs in change.difference.items():
            values = record[section] | {name: old for name, (old, _) in pairs.items()}
            if section == "data":  # a mixture alone has some fields
                values = {name: value for name, value in values.items() if value is not None}
            record = record | {section: values}
    return record
