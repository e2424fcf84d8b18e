"""The folder of a run: one process at a time, one configuration for its whole life."""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from core.checkpoint.manifest import JAX, TORCH, Manifest, digest, load_manifest
from core.checkpoint.steps import find_step, list_steps
from core.config import ModelConfig
from core.data.mixture import describe_phases, phases_of
from core.data.mixture_options import data_paths
from core.errors import UserError
from core.folder_kinds import Kind, kind_of
from core.folders import require_place, write_atomically
from core.locks import take_lock
from core.run import settings
from core.run.begun import has_begun, remove_start
from core.run.other_engine import ENGINE_SETTINGS, engine_of, kept_of_other, settings_for
from core.run.rates import is_derived
from core.run.schedule import require_continuous
from core.run.settings import FREE_SETTINGS, MIXTURE
from core.tokenizer import BUILT_IN, find_tokenizer
from core.tokenizer import require_same as require_same_tokenizer

LOCK = ".lock"  # which the process that trains into the folder holds; its content names that process
SOURCES = ("--preset", "--data", "--init-from", "--from")  # options that say what is trained, and on what
NOTICING = 10.0  # seconds within which a new file is seen by all on a disk that they share
Settings = TypeVar("Settings")


def run_record(
    config: Any, model: ModelConfig, steps: int, tokenizer: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """What config.json and every manifest say of a run: the command's settings, tokenizer and data.

    data: its `fingerprint`, and its `mixture` if it is one.
    """
    return {
        "run": settings.flatten(config) | {"steps": steps, "epochs": None},
        "model": dataclasses.asdict(model),
        "tokenizer": tokenizer,
        "data": {"path": data_name(config.data), **data},
    }


def data_name(data: str | Path | Sequence[str]) -> str:
    """What --data was given, as one text."""
    return str(data) if isinstance(data, str | Path) else " ".join(data)


def recorded_data(manifest: Manifest) -> dict[str, Any]:
    """What the record of a run says of its data, as a manifest has it."""
    data = {name: value for name, value in manifest.data.items() if name != "cursor"}
    return {"path": data_name(manifest.config["run"]["data"]), **data}


def recorded_run(manifest: Manifest) -> dict[str, Any]:
    """What config.json says of the run that a checkpoint is of, as far as its manifest has it."""
    template = {} if manifest.chat_template is None else {"chat_template": manifest.chat_template}
    return {
        "run": manifest.config["run"],
        "model": manifest.config["model"],
        "tokenizer": manifest.tokenizer,
        "data": recorded_data(manifest),
    } | template


def require_folder(out: Path) -> None:
    """Refuses an --out that no run can be written to; before anything slow, and nothing is made.

    Raises:
        UserError: it cannot be written, or is not empty and not a run's.
    """
    require_place(out)
    ours = any((out / name).exists() for name in ("config.json", LOCK)) or read_config(out)
    kind = kind_of(out)
    if kind in (Kind.WEIGHTS, Kind.ADAPTER):  # which have a config.json, too
        raise UserError(f"--out {out} is {kind.value}, and not an MTLM run; choose an empty or new folder")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"--out {out} is not empty and not an MTLM run; choose an empty or new folder")


@contextlib.contextmanager
def hold_folder(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Makes the run folder where there is none, and holds it for this process.

    What a start left in it that ended before its first update is removed, and `say` told of it. Of one that
    fails before its first update while this is entered, nothing stays but what was there before.
    """
    with hold_place(out):
        if not has_begun(out) and read_config(out):  # one that is not a run's is refused
            remove_start(out)
            say(f"the last start in {out} ended before its first update: this one replaces it")
        elif not (out / "config.json").is_file() and read_config(out):
            say(
                f"{out / 'config.json'} is missing: the settings are those that the newest checkpoint records"
            )
        before = {path.name for path in out.iterdir()}
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # of a disk that fails; the error is the one to tell
                if not has_begun(out):
                    remove_start(out, before)
            raise


@contextlib.contextmanager
def hold_place(out: Path) -> Iterator[None]:
    """Makes a folder where there is none, and holds it for this process. Where this fails while nothing is in
    it, the folder and those made above it are removed again."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    with lock_folder(out):
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if [path.name for path in out.iterdir()] == [LOCK]:
                    (out / LOCK).unlink()
                    for path in made:
                        path.rmdir()
            raise


def lock_folder(out: Path) -> TextIO:
    """Holds the run folder, which is made, for this process until the returned file is closed."""
    require_folder(out)
    lock = take_lock(out / LOCK, f"another process is training into {out}: stop it or give another --out")
    lock.truncate(0)
    lock.write(secrets.token_hex(8))
    lock.flush()
    return lock


def require_run(folder: Path, advice: str = "give one") -> dict[str, Any]:
    """The record of a run folder; a UserError with that advice where a path is none."""
    record = read_config(folder) if folder.is_dir() else None
    if record is None:
        raise UserError(f"{folder} is not the folder of a run (it has no config.json): {advice}")
    return record


def read_config(out: Path) -> dict[str, Any] | None:
    """The record in a run folder's config.json, or what its newest checkpoint has of it where that file is
    missing; None where there is neither."""
    path = out / "config.json"
    if not path.is_file():
        manifest = newest_manifest(out)
        return recorded_run(manifest) if manifest and manifest.kind == "train" else None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["run"], record["tokenizer"], record["data"]["fingerprint"]  # what the others read of it
        seal = record.pop("sha256", None)  # older versions wrote none
    except (ValueError, TypeError, KeyError) as error:
        if (kind := kind_of(out)) in (Kind.WEIGHTS, Kind.ADAPTER):  # which have a config.json of their own
            raise UserError(f"{out} is {kind.value}, and not an MTLM run: give that of a run") from None
        raise UserError(
            f"{path} is damaged ({error!r}): restore it, or delete it, so that the settings are those that "
            f"the newest checkpoint in {out / 'checkpoints'} records"
        ) from None
    if seal is not None and seal != digest(record):
        raise UserError(
            f"{path} does not match its own sha256, so it was damaged or edited: restore it, or delete its "
            'field "sha256" if the edit is meant'
        )
    return record


def begun_record(out: Path) -> dict[str, Any] | None:
    """As `read_config`, and None where the run has not begun, too: what a new start has to keep to."""
    record = read_config(out)
    return record if record and has_begun(out) else None


def check_run_folder(
    out: Path,
    record: dict[str, Any],
    allowed: tuple[str, ...],
    defaults: Any,
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
        changes = engine_of(old["run"]) != defaults.engine
        free = FREE_SETTINGS | ENGINE_SETTINGS if changes else FREE_SETTINGS
        run = settings_for(defaults.engine, old)
        settings.require_same(run, record["run"], allowed, out, defaults, mesh, free)
        require_same_data(old["data"], record["data"], allowed, out)


def require_same_data(old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...], out: Path) -> None:
    """Refuses to resume on other data, or in another mixture, that `allowed` does not name."""
    if old["fingerprint"] == new["fingerprint"]:
        return
    mixtures = old.get(MIXTURE), new.get(MIXTURE)
    before, now = (mixture["sources"] if mixture else {} for mixture in mixtures)
    changed = next((name for name in before if name in now and before[name] != now[name]), None)
    known = bool(before) or old["fingerprint"] in now.values()
    if "data" not in allowed and (changed or not known or not now):
        was, here = old["fingerprint"], new["fingerprint"]
        if changed:
            was, here = before[changed], now[changed]
        of = f", whose source {changed} is another one" if changed else ""
        raise UserError(
            f"the run in {out} was trained on {old['path']} ({was[:12]}), not {new['path']} ({here[:12]}){of}"
            ": give the same data, another --out, or --allow-change data"
        )
    phases = [mixture and mixture["phases"] for mixture in mixtures]
    if MIXTURE not in allowed and now and (phases[0] != phases[1] or before.keys() != now.keys()):
        raise UserError(
            f"the run in {out} was started with the mixture {describe(old)}, not {describe(new)}: give the "
            f"same --data, --weights and --phases, another --out, or --allow-change {MIXTURE} if the change "
            "is meant"
        )


def describe(data: dict[str, Any]) -> str:
    """The shares of a recorded mixture, in words."""
    return describe_phases(phases_of(data)) if MIXTURE in data else f"{data['path']} alone"


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
    """Writes config.json, whole or not at all, its last field the sha256 of all others.

    It keeps what an earlier one says for the other engine.
    """
    record = record | kept_of_other(read_config(out), record)
    text = json.dumps({**record, "sha256": digest(record)}, indent=1)
    write_atomically(out / "config.json", text + "\n")


def settings_of_run(folder: Path, default: Settings, argv: list[str]) -> Settings:
    """Those of the run in `folder`, for a command line to go over.

    `default` where there is no run, and for what is said of one start alone. A run of the other engine is
    continued by this one. One that has not begun gives its settings to a command line without any of
    `SOURCES`, such as --out alone, and to no other.
    """
    record, begun = read_config(folder), has_begun(folder)
    if record and not begun:
        typed = any(settings.given_value(argv, flag) is not None for flag in SOURCES)
        record = None if typed or "preset" not in record["run"] else record
    if not record:
        return default
    if "preset" not in record["run"]:
        raise UserError(f"the run in {folder} is of {command_of(record)}: resume it with that command")
    once = {name: getattr(default, name) for name in settings.ONCE}
    run = settings_for(default.engine, record)
    saved = dataclasses.replace(settings.unflatten(run, type(default)), **once)
    if record["tokenizer"]["name"] not in BUILT_IN and settings.given_value(argv, "--tokenizer") is None:
        carriers = (folder, *map(Path, data_paths(saved.data)))
        own = find_tokenizer(record["tokenizer"], carriers, f"the run in {folder}")
        saved = dataclasses.replace(saved, tokenizer=own)
    if not begun and is_derived(saved, ModelConfig(**record["model"])):
        # Another length or optimizer may be given now.
        saved = dataclasses.replace(saved, optim=dataclasses.replace(saved.optim, lr=None))
    return dataclasses.replace(saved, steps=None) if settings.given_value(argv, "--epochs") else saved


def command_of(record: dict[str, Any]) -> str:
    """The command of a run, by its record."""
    package = {JAX: "train_tpu", TORCH: "port_torch"}[engine_of(record["run"])]
    if "preset" not in record["run"]:
        return f"{package}.finetune"
    return f"{package}.{'run' if package == 'train_tpu' else 'train'}"


def require_shared(
    folder: Path, first: bool, share: Callable[[str], str], any_of: Callable[[bool], bool]
) -> None:
    """Refuses a folder that is not the same one for every process; the first has made it.

    Args:
        first: whether this process is the first.
        share: gives every process what the first gave it.
        any_of: whether a flag is set in any process.

    Raises:
        UserError: in every process.
    """
    folder = folder.absolute()
    name = f".shared-{secrets.token_hex(8)}"
    if first:
        (folder / name).touch()
    where = share(str(folder / name))
    mark = folder / Path(where).name
    deadline = time.monotonic() + NOTICING
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = any_of(not seen)
    if first:
        mark.unlink()
    if blind:
        raise UserError(
            f"not every process sees the folder {Path(where).parent} of the first: give all of them as --out "
            "one absolute path on a disk that they share"
        )
