"""Which checkpoints a folder holds: the complete steps, the newest, the intact ones, those to keep."""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from core.checkpoint.manifest import MANIFEST, Manifest, load_manifest, sync_path, verify
from core.errors import UserError

STEP_NAME = re.compile(r"\d{8,}")
HIDDEN_NAME = re.compile(r"\.\d{8,}\.(partial|deleted)")  # being written, being deleted


def step_path(folder: Path, step: int) -> Path:
    """Where a step lies in a folder of checkpoints, whether it is there or not."""
    return folder / f"{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """The complete steps in a folder of checkpoints, in order; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))


def delete_step(step_dir: Path) -> None:
    """Deletes a step under a hidden name, so that no half of it is ever taken for a checkpoint."""
    hidden = step_dir.with_name(f".{step_dir.name}.deleted")
    step_dir.rename(hidden)
    shutil.rmtree(hidden)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints of a run are kept: the `last` newest, as many of those in good health
    (core/run/guard.py), every step divisible by `every`, and `steps`."""

    last: int = 2
    every: int | None = None
    steps: Collection[int] = ()


def good_steps(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints that were saved in good health, or before that was noted."""
    return [step for step in list_steps(folder) if _is_good(step_path(folder, step))]


def _is_good(step_dir: Path) -> bool:
    try:
        health = load_manifest(step_dir).health
    except UserError:  # damaged: it is not what one would go back to
        return False
    return health is None or health["good"]


def dispensable_steps(folder: Path, keep: Keep) -> list[int]:
    """The steps in a folder of checkpoints that need not be kept.

    No checkpoint from before a streak of skipped updates, or before the loss rose, is among them for one in
    or after it.
    """
    steps = list_steps(folder)
    good = (step for step in reversed(steps) if _is_good(step_path(folder, step)))
    kept = {*steps[-keep.last :], *itertools.islice(good, keep.last), *keep.steps}
    return [step for step in steps if step not in kept and (keep.every is None or step % keep.every)]


def delete_dispensable(folder: Path, keep: Keep) -> None:
    """Deletes the steps that need not be kept."""
    for step in dispensable_steps(folder, keep):
        delete_step(step_path(folder, step))


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half-written or half-deleted in a folder of checkpoints."""
    for path in folder.iterdir():
        if HIDDEN_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def find_step(path: Path) -> Path:
    """The checkpoint that `path` means: a step folder itself, or the newest one of a run folder or of its
    `checkpoints`. It is not verified yet. UserError when there is none."""
    if (path / MANIFEST).exists():
        return path
    folder = _steps_folder(path)
    steps = list_steps(folder)
    if steps:
        return step_path(folder, steps[-1])
    if folder == path and STEP_NAME.fullmatch(path.name) and path.is_dir():
        return path  # a step that lost its manifest: opening it says so
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
    else:
        names = sorted(entry.name for entry in folder.iterdir())
        there = f"holds {', '.join(names[:5])}{' and more' * (len(names) > 5)}" if names else "is empty"
    raise UserError(
        f"no checkpoint in {path}: {folder} {there}; give a run folder in which a checkpoint was saved, "
        f"or a folder that holds {MANIFEST}"
    )


def run_folder(step_dir: Path) -> Path:
    """RUN of RUN/checkpoints/STEP; a checkpoint that lies elsewhere, as an imported one, stands for itself.

    Always a path that ends in a name.
    """
    if step_dir.absolute().parent.name != "checkpoints":
        return step_dir
    given = step_dir.parent.parent
    return given if given.name not in ("", "..") else step_dir.resolve().parent.parent


def tokenizer_carriers(step_dir: Path) -> tuple[Path, Path]:
    """The folders that may carry the tokenizer of a checkpoint: itself and its run's."""
    return step_dir, run_folder(step_dir)


def newest_intact(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest step of a run folder (or its `checkpoints`) that verifies, and the newer ones that do not
    with their reasons, newest first. UserError when none does."""
    find_step(path)  # raises when there is none at all
    folder = _steps_folder(path)
    skipped: list[tuple[Path, str]] = []
    for step in reversed(list_steps(folder)):
        step_dir = step_path(folder, step)
        try:
            verify(step_dir)
        except UserError as error:
            skipped.append((step_dir, str(error)))
        else:
            return step_dir, skipped
    reasons = "; ".join(reason for _, reason in skipped)
    raise UserError(f"none of the {len(skipped)} checkpoints in {folder} is intact: {reasons}")


def set_aside(step_dir: Path) -> Path:
    """Renames a damaged step to `damaged-00001200`, so that it is no longer the newest; returns the new
    path. A run that falls back to an older step does this before it saves again."""
    aside = step_dir.with_name(f"damaged-{step_dir.name}")
    if aside.exists():
        raise UserError(f"{aside} exists already: remove it, and then fall back from {step_dir} again")
    step_dir.rename(aside)
    sync_path(step_dir.parent)
    return aside


def find_start(
    folder: Path,
    from_step: int | None,
    fallback: bool,
    check: Callable[[Manifest], None],
    say: Callable[[str], None],
) -> Path | None:
    """The checkpoint of a run's folder of them to resume from; None where there is none yet.

    from_step: the older one to take. fallback: whether damaged ones are set aside, which `say` is told. One
    that is not the newest is given to `check`, which may refuse it, before anything is renamed.

    Raises:
        UserError: it is not there, or none is intact.
    """
    steps = list_steps(folder)
    if from_step is not None:
        if from_step not in steps:
            there = f"holds steps {', '.join(map(str, steps))}" if steps else "holds none"
            raise UserError(f"--from-step {from_step} is not there: {folder} {there}")
        check(load_manifest(step_path(folder, from_step)))
        return step_path(folder, from_step)
    if not steps:
        return None
    if not fallback:
        return find_step(folder)
    step_dir, skipped = newest_intact(folder)
    check(load_manifest(step_dir))
    for damaged, why in skipped:
        aside = set_aside(damaged)
        say(
            f"checkpoint {damaged.name} is damaged and now {aside.name}; resuming from {step_dir.name}: {why}"
        )
    return step_dir


def leave_newer(folder: Path, step: int) -> list[Path]:
    """Renames all steps after `step`, for a run that resumes from it, to `left-00001200`; the new paths.

    They may be resumed again by renaming them back, or removed.
    """
    left = []
    for newer in (other for other in list_steps(folder) if other > step):
        aside = folder / f"left-{step_path(folder, newer).name}"
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"left-{step_path(folder, newer).name}-{number}")
        step_path(folder, newer).rename(aside)
        left.append(aside)
    sync_path(folder)
    return left


def _steps_folder(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
