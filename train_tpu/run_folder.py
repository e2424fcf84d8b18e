"""The folder of a run: one process at a time, one configuration for its whole life."""

import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from core.config import ModelConfig
from core.errors import UserError
from core.folders import require_place, write_atomically
from core.manifest import Manifest, digest, load_manifest
from core.run.schedule import require_continuous
from core.steps import find_step, list_steps
from core.tokenizer import require_same as require_same_tokenizer
from train_tpu import config as settings
from train_tpu.config import RunConfig

DEFAULTS = RunConfig()


def run_record(
    config: Any, model: ModelConfig, steps: int, tokenizer: dict[str, Any], fingerprint: str
) -> dict[str, Any]:
    """What config.json and every manifest say of a run: the command's settings, tokenizer and data."""
    return {
        "run": settings.flatten(config) | {"steps": steps, "epochs": None},
        "model": dataclasses.asdict(model),
        "tokenizer": tokenizer,
        "data": {"path": str(config.data), "fingerprint": fingerprint},
    }


def require_folder(out: Path) -> None:
    """Refuses an --out that no run can be written to; before anything slow, and nothing is made.

    Raises:
        UserError: it cannot be written, or is not empty and not a run's.
    """
    require_place(out)
    ours = any((out / name).exists() for name in ("config.json", ".lock"))
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"--out {out} is not empty and not an MTLM run; choose an empty or new folder")


def lock_folder(out: Path) -> TextIO:
    """Holds the run folder for this process until the returned file is closed."""
    require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training into {out}: stop it or give another --out") from None
    return lock


def read_config(out: Path) -> dict[str, Any] | None:
    """The record in a run folder's config.json; None where there is none."""
    path = out / "config.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["run"], record["tokenizer"], record["data"]["fingerprint"]  # what the others read of it
        seal = record.pop("sha256", None)  # older versions wrote none
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): write it again from `config` in a manifest.json in "
            f"{out / 'checkpoints'}"
        ) from None
    if seal is not None and seal != digest(record):
        raise UserError(
            f"{path} does not match its own sha256, so it was damaged or edited: restore it, or delete its "
            'field "sha256" if the edit is meant'
        )
    return record


def check_run_folder(
    out: Path,
    record: dict[str, Any],
    allowed: tuple[str, ...],
    defaults: Any = DEFAULTS,
    mesh: Callable[[str | None], str] = str,
) -> None:
    """Refuses to resume a run under other settings, model, tokenizer or data; see `require_same`.

    A learning rate that would jump is refused whatever is allowed, and first: no other message may advise it.
    """
    old = read_config(out)
    if old:
        require_same_tokenizer(old["tokenizer"], record["tokenizer"], f"the run in {out}", "the data given")
        if manifest := newest_manifest(out):
            require_continuous(manifest.config["run"], record["run"], manifest.step, out)
        settings.require_same(old["run"], record["run"], allowed, out, defaults, mesh)
        if old["data"]["fingerprint"] != record["data"]["fingerprint"] and "data" not in allowed:
            raise UserError(
                f"the run in {out} was trained on {old['data']['path']} ({old['data']['fingerprint'][:12]}), "
                f"not {record['data']['path']} ({record['data']['fingerprint'][:12]}): give the same data, "
                "another --out, or --allow-change data"
            )


def newest_manifest(out: Path) -> Manifest | None:
    """That of a run's newest checkpoint; None where there is none, or one that cannot be read: whoever opens
    it says so, or falls back to an older one."""
    if not list_steps(out / "checkpoints"):
        return None
    try:
        return load_manifest(find_step(out))
    except UserError:
        return None


def write_config(out: Path, record: dict[str, Any]) -> None:
    """Writes config.json, whole or not at all, its last field the sha256 of all others."""
    text = json.dumps({**record, "sha256": digest(record)}, indent=1)
    write_atomically(out / "config.json", text + "\n")
