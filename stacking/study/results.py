"""The results of a study: one small JSON file, of which reports are made and in which a study continues."""

import dataclasses
import datetime
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from core.checkpoint.manifest import code_version
from core.errors import UserError
from core.figures import require_json
from core.folders import write_atomically
from core.run.folder import read_config
from core.run.log import CARRIED, read_log
from core.run.settings import AUTOMATIC, FREE_SETTINGS, FROM_PRESET, MIXTURE, ONCE, flatten
from stacking.study.definition import Definition
from stacking.study.runs import Run
from train_tpu.config import RunConfig

TABLE, PICTURE = ".md", ".png"
"""With which the report's files end; they have the name of the results otherwise."""
UNCOMPARED = {
    *AUTOMATIC, *ONCE, *FROM_PRESET, "vocab_size", "preset", "steps", "epochs", "rewarm", "rewarm_at", "mesh",
}  # fmt: skip
"""Settings that a folder of the same run may have otherwise, as a grown one's, or that its model tells."""
CHOSEN = ("optimizer", "lr", "seed", "batch", "warmup", "decay", "decay_shape", "weight_decay")
"""Settings that results have of every run, whether the study gives them or its preset."""
FORMER = {"decay": 0.2, "decay_shape": "linear", "weight_decay": 0.1}
"""What presets gave when results did not have them yet, until 2026-11-30."""
POINTS = 40  # of a run's training loss that are kept


class Results:
    """The file of results."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """What is known of each run, by name."""
        return self.record["runs"]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The same as a list, each with its name."""
        return [{"name": name, **entry} for name, entry in self.runs.items()]

    def losses(self, name: str) -> dict[str, float] | None:
        """The last held-out losses of a run in nats per token, by set; None if it is missing or halted."""
        entry = self.runs.get(name)
        return None if entry is None or entry["halted"] else as_floats(entry["losses"])

    def begin(self) -> None:
        """Notes that this process adds to them: its code, command and date."""
        self.record["sessions"].append(
            {
                "commit": code_version()["commit"],
                "command": shlex.join(["python", "-m", "stacking.study", *sys.argv[1:]]),
                "date": datetime.date.today().isoformat(),
            }
        )

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Keeps what is known of a run, on the disk, too."""
        session = {"session": len(self.record["sessions"]) - 1}
        self.runs[run.name] = {"labels": run.labels, **run.identity, **session, **entry}
        self.save()

    def save(self) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in self.runs.items()]
        head = json.dumps({k: v for k, v in self.record.items() if k != "runs"}, indent=1)
        body = ",\n".join(lines)
        write_atomically(self.path, f'{head[:-2]},\n "runs": {{\n{body}\n }}\n}}\n')


def read_results(path: Path) -> Results:
    """The results in a file, of runs that are in it under several names the first.

    Raises:
        UserError: there are none, or they are damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} holds no results yet: leave --report out to train, or give --results")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["kind"], record["sessions"]
        first: dict[str, str] = {}
        for name, entry in record["runs"].items():
            first.setdefault(run_key(entry, entry["fingerprint"]), name)
        record["runs"] = {name: record["runs"][name] for name in first.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): restore it, or give another --results") from None
    return Results(path, record)


def require_results_file(path: Path) -> None:
    """Refuses a file in which there can be no results; nothing is made."""
    require_json(path)
    if path.suffix in (TABLE, PICTURE):
        raise UserError(
            f"--results {path}: the report of results is written next to them, with {TABLE} and {PICTURE}; "
            "name a .json file"
        )


def open_results(path: Path, definition: Definition) -> Results:
    """The results of a study, or the beginning of them."""
    head = {
        "study": definition.name, "kind": definition.kind, "heldout": definition.heldout,
        "file": definition.text,
    }  # fmt: skip
    if not path.is_file():
        return Results(path, {**head, "sessions": [], "runs": {}})
    results = read_results(path)
    if results.record["kind"] != definition.kind:
        raise UserError(
            f"{path} holds a study of {results.record['kind']}, not of {definition.kind}: give another "
            "--results"
        )
    results.record.update(head)
    return results


@dataclasses.dataclass(frozen=True)
class Text:
    """What runs were trained on."""

    distinct_tokens: int
    fingerprint: str


def data_text(data: str | tuple[str, ...]) -> str:
    """What --data names, in one string."""
    return data if isinstance(data, str) else " ".join(data)


def _chosen(run: Run) -> dict[str, Any]:
    config = flatten(run.settings.config)
    return {name: config[name] for name in CHOSEN}


def _begin_entry(run: Run) -> dict[str, Any]:
    """What an entry has of a run before it is trained."""
    return {"labels": run.labels, **run.identity, **_chosen(run)}


def told(entry: dict[str, Any]) -> dict[str, Any]:
    """What tells a run from others: the settings that its study gives, and those that results have of every
    run. What else it leaves to its preset is not looked up: presets change, and what was trained does not."""
    given = {"preset": RunConfig.preset} | entry["settings"]
    warmup = {"warmup": 50 if given["preset"].endswith("-tiny") else 100}
    return FORMER | warmup | given | {name: entry[name] for name in (*CHOSEN, "steps") if name in entry}


def run_key(entry: dict[str, Any], text: str) -> str:
    """The same for two entries that are one run, whatever their names. text: what tells theirs."""
    # A trunk has the settings of its decays, so that its name adds nothing; what is grown is an arm.
    lineage = [entry.get("at"), entry.get("grow"), *(entry["labels"].get(x) for x in ("arm", "grown_at"))]
    numbers = json.loads(json.dumps([told(entry), lineage, text]), parse_int=float)  # 1 is 1.0
    return json.dumps(numbers, sort_keys=True)


def _key(run: Run, texts: dict[str, Text] | None) -> str:
    text = data_text(run.settings.config.data) if texts is None else texts[run.name].fingerprint
    return run_key(_begin_entry(run), text)


def distinct_runs(runs: list[Run], texts: dict[str, Text] | None) -> list[Run]:
    """Runs without those that are an earlier one under another name.

    texts: by the names of the runs. None: they are not open yet, and are told by the names of their data.
    """
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(_key(run, texts), run)
    return list(found.values())


def take_names(results: Results, runs: list[Run], texts: dict[str, Text] | None) -> None:
    """Gives entries that are one of `runs`, or of those that they come from, its name and labels: where the
    study's file gets a list in place of a value, say, runs that have ended are renamed.

    texts: as in `distinct_runs`.
    """
    known: dict[str, list[str]] = {}
    for name, entry in results.runs.items():
        text = entry["data"] if texts is None else entry["fingerprint"]
        known.setdefault(run_key(entry, text), []).append(name)
    taken: dict[str, Run] = {}
    for run in {run.name: run for leaf in runs for run in leaf.ancestry}.values():
        names = known.get(_key(run, texts), [])
        free = [name for name in names if name not in taken]
        if free:
            taken[run.name if run.name in free else free[0]] = run
    # Another run may have the name: it keeps it, and `require_same_runs` refuses.
    while clashes := {old for old, run in taken.items() if run.name in results.runs.keys() - taken.keys()}:
        taken = {old: run for old, run in taken.items() if old not in clashes}
    results.record["runs"] = {
        taken[name].name if name in taken else name: (
            entry | {"labels": taken[name].labels, **taken[name].identity} if name in taken else entry
        )
        for name, entry in results.runs.items()
    }


def require_same_text(results: Results, runs: list[Run], texts: dict[str, Text]) -> None:
    """Refuses results of runs that were trained on another text. texts: by the names of the runs."""
    for run in runs:
        entry = results.runs.get(run.name)
        if entry is not None and entry["fingerprint"] != texts[run.name].fingerprint:
            raise UserError(
                f"{results.path} has {run.name} trained on {entry['data']}, which is another text than "
                f"{data_text(run.settings.config.data)}: give that text with --data, or another --results"
            )


def require_same_runs(results: Results, runs: list[Run]) -> None:
    """Refuses results of a run that had other settings."""
    for run in runs:
        entry = results.runs.get(run.name)
        if entry is None:
            continue
        own = run.identity
        lineage = own.keys() - {"settings"}
        old, new = (
            told(one) | {name: one.get(name) for name in lineage} for one in (entry, _begin_entry(run))
        )
        for name in sorted({*entry["settings"], *own["settings"], *lineage, *CHOSEN}):
            if old.get(name) != new.get(name):
                had = f"without {name}" if old.get(name) is None else f"with {name} {old[name]}"
                asks = "leaves it out" if new.get(name) is None else f"asks for {new[name]}"
                raise UserError(
                    f"{results.path} has {run.name} {had}, and the study {asks}: {_remedy(run, name, old)}"
                    "rename the run in the study, or give another --results"
                )


def _remedy(run: Run, name: str, old: dict[str, Any]) -> str:
    """What a study can say to get the run that there is, where it leaves a setting to its preset."""
    left = name in CHOSEN and name not in run.settings.given
    return f"write {name} = {json.dumps(old[name])} into the study, " if left else ""


def require_same_folder(run: Run, folder: Path, text: Text) -> None:
    """Refuses the folder of a run in which another one lies: of the study before it was changed, say."""
    record = read_config(folder) if folder.is_dir() else None
    if record is None:
        return
    own = flatten(run.settings.config)
    recorded = FORMER | record["run"]
    names = own.keys() & recorded.keys() - FREE_SETTINGS - UNCOMPARED
    old = {name: recorded[name] for name in names} | {"model": record["model"]}
    new = {name: own[name] for name in names} | {"model": dataclasses.asdict(run.model)}
    if not run.keep:
        old["steps"], new["steps"] = record["run"]["steps"], run.steps
    if MIXTURE not in record["data"]:
        old["text"], new["text"] = record["data"]["fingerprint"], text.fingerprint
    for name in sorted(new):
        if old[name] != new[name]:
            raise UserError(
                f"{folder} holds a run with {name} {old[name]}, and the study asks for {new[name]}: "
                f"{_remedy(run, name, old)}remove that folder, or give another --out"
            )


def summarize(run: Run, folder: Path, text: Text, halted_at: int | None) -> dict[str, Any]:
    """What is kept of a run, out of its log. halted_at: the step at which the guard ended it, or the run that
    it comes from."""
    train, evaluated = read_log(folder, "train"), read_log(folder, "eval")
    own = [row for row in train if CARRIED not in row]
    curve: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in evaluated:
        curve.setdefault((row["step"], CARRIED in row), {})[row["split"]] = row["nll"]
    model = run.model
    entry: dict[str, Any] = {
        "halted": halted_at is not None,
        "model": {
            "parameters": model.n_params, "embeddings": model.n_embedding_params,
            "layers": model.n_layers, "width": model.d_model, "context": model.context,
            "flops_per_token": model.flops_per_token(),
        },
        **_chosen(run),
        "data": data_text(run.settings.config.data),
        **dataclasses.asdict(text),
        "skipped": len(read_log(folder, "skip")),
        "tokens_per_second": speed(own),
        "curve": [[step, run.flops(step), losses] for (step, _), losses in curve.items()],
        "train": thinned([(row["step"], row["nll"]) for row in own]),
    }  # fmt: skip
    devices = [row["device"] for row in read_log(folder, "event") if "device" in row]
    entry["device"] = devices[-1] if devices else None
    if halted_at is not None:
        return entry | {"halted_at": halted_at}
    if run.keep:
        return entry
    last = [row for row in evaluated if row["step"] == run.steps and CARRIED not in row]
    if not last:
        raise UserError(
            f"the log of {folder} lacks its last evaluation: remove that folder and give the same command "
            "again"
        )
    return entry | {
        "tokens": run.steps * run.settings.batch_tokens,
        "flops": run.flops(run.steps),
        "losses": {row["split"]: row["nll"] for row in last},
        "bits_per_byte": {row["split"]: row["bits_per_byte"] for row in last},
    }


def speed(rows: list[dict[str, Any]]) -> float | None:
    """Tokens per second, the median over the updates of a log."""
    return statistics.median(row["tokens_per_second"] for row in rows) if rows else None


def thinned(points: list[tuple[int, Any]]) -> list[list[float]]:
    """Means over at most POINTS stretches of (step, loss), each with its last step."""
    n = max(1, -(-len(points) // POINTS))
    stretches = [points[i : i + n] for i in range(0, len(points), n)]
    return [[part[-1][0], round(statistics.fmean(float(loss) for _, loss in part), 4)] for part in stretches]


def as_floats(losses: dict[str, Any]) -> dict[str, float]:
    """Losses as numbers: JSON has no NaN, so that a log says "nan"."""
    return {name: float(value) for name, value in losses.items()}
