"""The harness's tasks by name, with their data from the hub or from local files.

For local files a task is the harness's own definition with another `dataset_path`: a YAML file that includes
the harness's, with the documents, in a folder that is removed afterwards.
"""

import contextlib
import difflib
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from core.errors import UserError
from eval.hub import go_offline_if_unreachable
from eval.local_data import Fields, LocalSet, Source, local_source, read_local

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
SPLIT_SETTINGS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
FEWSHOT_SEED = 1234  # the harness's own default
BLIMP = "blimp"  # the one group that local files hold

logging.getLogger("lm_eval").setLevel(logging.ERROR)
datasets.disable_progress_bars()


class Tasks:
    """Tasks whose names are known; `load` makes one. See `open_tasks`."""

    def __init__(self, managers: dict[str, TaskManager], local: dict[str, LocalSet]):
        self.names = list(managers)
        """What can be loaded, groups that are in local files as their tasks."""
        self._managers = managers
        self._local = local

    def load(self, name: str, shots: int | None) -> dict[str, Any]:
        """A task, group or tag with its documents, in the form that `lm_eval.evaluator.evaluate` takes.

        shots: solved examples before each question; None is what the task says, or none.

        Raises:
            UserError: its documents are neither local nor to be had from the hub, or it cannot be run here.
        """
        if not any(task in self._local for task in _leaves([name])):
            go_offline_if_unreachable()
        try:
            loaded = self._managers[name].load([name])
        except OSError as error:  # of the hub: several kinds, all of this class
            raise UserError(
                f"the data of {name} is neither in a --data-dir nor on this machine, and the Hugging Face "
                f"hub cannot be reached ({_first_line(error)}): give the folder of the data with --data-dir, "
                "or try again with a network"
            ) from None
        except (ImportError, ValueError) as error:
            raise UserError(f"the task {name} cannot be run here: {_first_line(error)}") from None
        for task in loaded["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (shots is not None and fixed != 0):  # 0: the task's prompt is made without
                task.set_config("num_fewshot", 0 if shots is None else shots)
            if wanted := task.get_config("num_fewshot"):
                if not (task.has_training_docs() or task.has_validation_docs()):
                    raise UserError(f"{name} has no documents to take --shots from")
                there = sum(1 for _ in itertools.islice(task.fewshot_docs(), wanted + 1))
                if there <= wanted:  # one more than is shown: a question is no example of itself
                    raise UserError(
                        f"{name} has {there:,} documents to take --shots from: give fewer than {there:,}"
                    )
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def files(self, task: str) -> dict[str, str]:
        """sha256 of each local file that a task's documents come from; empty where they come from the hub."""
        return self._local[task].sha256 if task in self._local else {}


@contextlib.contextmanager
def open_tasks(names: list[str], data_dir: Path | None) -> Iterator[Tasks]:
    """The tasks of these names, those that `data_dir` holds from there.

    Raises:
        UserError: a name is unknown (the nearest are given), or a local file is missing or of another format.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir} is {'a file' if data_dir.exists() else 'not there'}: give a folder"
        )
    harness: TaskManager | None = None
    if not (data_dir and all(map(_is_local, names))):
        _require_mentioned(names)
        harness = TaskManager()  # indexes thousands of files: seconds
        for name in names:
            if name not in harness.task_index:
                raise UserError(_unknown(name, harness.all_tasks))
        if data_dir:
            names = list(dict.fromkeys(leaf for name in names for leaf in _local_members(name, harness)))
    with tempfile.TemporaryDirectory(prefix="mtlm-eval-") as name:
        folder, local = Path(name), {}
        from_files = [name for name in names if _is_local(name)] if data_dir else []
        for task in _leaves(from_files):
            source = local_source(task)
            local[task] = read_local(task, source, data_dir)
            _write_task(task, source, local[task].splits, folder)
        ours = TaskManager(include_path=folder, include_defaults=False)
        yield Tasks({name: ours if name in from_files else harness for name in names}, local)


def _require_mentioned(names: list[str]) -> None:
    """Refuses a name that is no value in the harness's definitions, in a fifth of the time that indexing them
    takes. A value need not be a name: that only the index tells."""
    values, defined = _mentioned()
    if unknown := [name for name in names if name not in values]:
        raise UserError(_unknown(unknown[0], defined))


def _mentioned() -> tuple[set[str], set[str]]:
    """Every value of one word in the harness's definitions, and those that define a task, a group or a tag.

    Read as lines, not as YAML, which takes seconds; included files have any name and suffix.
    """
    code = (".py", ".pyc", ".md")
    files = [path for path in DEFINITIONS.rglob("*") if path.suffix not in code and path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    word = r"['\"]?([^\s'\"\[\],]+)['\"]?[ \t]*(?=$|[,\]#])"
    values = re.findall(rf"(?:^|[:\-\[,])[ \t]*{word}", text, re.MULTILINE)
    defined = re.findall(rf"^['\"]?(?:task|group|tag)['\"]?:[ \t]*{word}", text, re.MULTILINE)
    return set(values), set(defined)


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    also = f"; near it are {', '.join(near)}" if near else ""
    return f"lm-eval has no task {name!r}{also} (`lm-eval ls tasks` lists all)"


def _is_local(name: str) -> bool:
    """Whether a data folder can hold a task, or a group as such."""
    return name == BLIMP or local_source(name) is not None


def _local_members(name: str, harness: TaskManager) -> list[str]:
    """The members of a tag or group if a data folder can hold all of them, else the name itself."""
    if _is_local(name):
        return [name]
    entry = harness.task_index[name]
    members = sorted(entry.tags) if entry.kind is Kind.TAG else (entry.cfg or {}).get("task", [])
    if entry.kind not in (Kind.TAG, Kind.GROUP) or not all(isinstance(member, str) for member in members):
        return [name]
    leaves = [leaf for member in members for leaf in _local_members(member, harness)]
    return leaves if leaves and all(map(_is_local, leaves)) else [name]


def _leaves(names: list[str]) -> list[str]:
    """The names, BLiMP's members in its place."""
    leaves: list[str] = []
    for name in names:
        leaves += _group(BLIMP)["task"] if name == BLIMP else [name]
    return list(dict.fromkeys(leaves))


def _group(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEFINITIONS / name / f"_{name}.yaml").read_text(encoding="utf-8"))


def _write_task(task: str, source: Source, splits: dict[str, list[Fields]], folder: Path) -> None:
    """The task's definition with its documents in `folder`; splits that the files lack are switched off."""
    data_files = {}
    for split, documents in splits.items():
        path = folder / f"{task}-{split}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        data_files[split] = str(path)
    definition = {
        "include": str(DEFINITIONS / source.definition),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "cache")},
    }
    if task.startswith(f"{BLIMP}_"):  # its documents are the "train" split, scored as validation
        (folder / "blimp.yaml").write_text(yaml.safe_dump(_group(BLIMP)), encoding="utf-8")
    else:
        definition |= {setting: None for split, setting in SPLIT_SETTINGS.items() if split not in splits}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
