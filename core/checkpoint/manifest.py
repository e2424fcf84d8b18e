"""The readable half of a checkpoint: `manifest.json`, which says what the step folder holds and proves it.

Orbax's files do not notice every flipped bit, and an array whose file is missing reads as zeros. So the
manifest lists each file of its folder with size and sha256, and carries its own sha256 as well. Whoever
opens a checkpoint checks these first. A folder exported to others carries the same under a name of its own.
"""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from core.progress import Activity

FORMAT_VERSION = 1
MANIFEST = "manifest.json"  # of a checkpoint
EXPORT_MANIFEST = "mtlm_manifest.json"  # of an exported folder, which other programs read as well
CARD = "README.md"  # of an exported folder
ADVICE = {
    MANIFEST: "copy the checkpoint again from its source, or resume from an older one with --fallback",
    EXPORT_MANIFEST: "copy the folder again from its source, or export it again",
}
OPTIONAL = {"health", "steering", "chat_template"}  # fields that older files lack
LISTINGS = ("tree", "files")  # fields written with one line per entry

Json = dict[str, Any]


JAX, TORCH = "JAX", "PyTorch"  # the engines that train

# Operations of a lineage after which a run counts its steps and tokens from 0.
NEW_RUN = ("init_from", "train", "finetune")
CHANGE = "change_engine"  # the operation after which another engine trains the same run


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the arrays. All values are JSON: a tuple comes back as a list.

    The caller leaves `tree` and `files` empty; saving fills them.
    """

    kind: Literal["train", "params"]
    """The whole training state, or parameters alone (what is imported or given away)."""
    step: int
    sequences: int
    tokens: int
    """Counted from the start of the run, like `step` and `sequences`."""
    config: Json
    """The full resolved configurations: `model`, `run`."""
    tokenizer: Json
    """Which tokenizer, with its content hash."""
    data: Json | None = None
    """`fingerprint` of the dataset and `cursor`, the next sequence to read; None: not trained here."""
    health: Json | None = None
    """Of a run's checkpoint, see core/run/guard.py: whether it is `good`, its recent `loss`, the `streak` of
    skipped updates before it. None, and not in the file: not known."""
    steering: list[Json] | None = None
    """What was changed while the run trained, up to here (core/run/steering.py). None, and not in the file:
    nothing."""
    chat_template: str | None = None
    """How conversations are written (core/chat.py). None, and not in the file: the model knows none."""
    lineage: list[Json] = dataclasses.field(default_factory=list)
    """What these parameters were grown or imported from, oldest first."""
    code: Json = dataclasses.field(default_factory=lambda: code_version())
    """What wrote it: versions of this package, its commit, jax, flax and orbax."""
    tree: dict[str, Json] = dataclasses.field(default_factory=dict)
    """Leaf path -> `shape` and `dtype`."""
    files: dict[str, Json] = dataclasses.field(default_factory=dict)
    """Path under the step folder -> `size` in bytes and `sha256`."""
    format_version: int = FORMAT_VERSION

    @property
    def engine(self) -> str:
        """Which engine wrote it; those of PyTorch say its version."""
        return TORCH if "torch" in self.code else JAX

    @property
    def last_growth(self) -> Json | None:
        """The lineage record of the last time this run was grown; `stacking.grow` writes it.

        What its parameters were taken from may have been grown as well; its counters are of another run.
        """
        for entry in reversed(self.lineage):
            if entry["operation"] in NEW_RUN:
                return None
            if entry["operation"] == "grow":
                return entry
        return None

    @property
    def took_parameters(self) -> bool:
        """Whether the run began with the parameters of another one, whose training its counters leave out."""
        return any(entry["operation"] in NEW_RUN for entry in self.lineage)

    def resumed_from(self, old: "Manifest") -> "Manifest":
        """This run's manifest with the counters, history and template of the checkpoint that it resumes from.

        Where the other engine wrote that, the lineage says so, and with which versions.
        """
        same = ("step", "sequences", "tokens", "lineage", "health", "chat_template")
        resumed = dataclasses.replace(self, **{name: getattr(old, name) for name in same})
        if old.engine == self.engine:
            return resumed
        counters = {"step": old.step, "sequences": old.sequences, "tokens": old.tokens}
        entry = {"operation": CHANGE, "from": old.engine, "to": self.engine, **counters, "code": old.code}
        return dataclasses.replace(resumed, lineage=[*old.lineage, entry])

    def to_json(self) -> str:
        """The text of manifest.json, its last field the sha256 of all others."""
        fields = dataclasses.asdict(self)
        fields = {"format_version": fields.pop("format_version"), **fields}
        fields = {name: value for name, value in fields.items() if value is not None or name not in OPTIONAL}
        lines = []
        for name, value in fields.items():
            if name in LISTINGS and value:
                entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value[key])}" for key in value)
                text = f"{{\n{entries}\n }}"
            else:
                text = json.dumps(value, indent=1).replace("\n", "\n ")
            lines.append(f' "{name}": {text},\n')
        return f'{{\n{"".join(lines)} "sha256": "{digest(fields)}"\n}}\n'

    @classmethod
    def from_json(cls, text: str, where: Path | str = MANIFEST) -> "Manifest":
        """Reads what `to_json` wrote; `where` is the file's name for the `UserError` if it did not."""
        advice = ADVICE[Path(where).name]
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is damaged ({error}): {advice}") from None
        if not isinstance(fields, dict) or "format_version" not in fields:
            raise UserError(f"{where} is not an MTLM manifest: it has no format_version")
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{where} has format version {version!r}, and this version of mtlm reads {FORMAT_VERSION}: "
                "open it with the version that wrote it (see `code` in the manifest)"
            )
        known = {field.name for field in dataclasses.fields(cls)} | {"sha256"}
        for problem, names in (
            ("lacks", known - fields.keys() - OPTIONAL),
            ("has the unknown", fields.keys() - known),
        ):
            if names:
                raise UserError(f"{where} {problem} field {', '.join(sorted(names))}: {advice}")
        if fields.pop("sha256") != digest(fields):
            raise UserError(f"{where} does not match its own sha256, so it was damaged or edited: {advice}")
        return cls(**fields)


def digest(fields: Json) -> str:
    """sha256 of the fields in one canonical spelling, so that layout does not matter and content does."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_version() -> Json:
    """Versions of this package and of what reads and writes checkpoints; None for what is not known."""
    versions = package_versions("mtlm", "jax", "flax", "orbax-checkpoint")
    return {**versions, "commit": _git_commit(Path(__file__).parents[2])}


def package_versions(*names: str) -> Json:
    """The versions of packages; None for one that is not installed, as this one is not in a mere checkout."""
    versions: Json = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit(root: Path) -> str | None:
    """The checkout's commit, with "-dirty" if tracked files differ from it; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or it does not trust the folder's owner
        return None


def differing_leaves(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Path -> (what a manifest's tree says of it, what `wanted` does) where path, shape or dtype differ."""
    here = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in wanted.items()}
    there = {path: f"{leaf['dtype']}{leaf['shape']}" for path, leaf in saved.items()}
    pairs = {path: (there.get(path, "missing"), here.get(path, "missing")) for path in {**here, **there}}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def seal(step_dir: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Hashes every file of `step_dir` and writes its manifest; all of it is on the disk on return.

    `name` is EXPORT_MANIFEST for an exported folder, here as in the functions below.
    """
    names = _list_files(step_dir, name)
    manifest = dataclasses.replace(manifest, files=hash_files(step_dir, names, sync=True))
    path = step_dir / name
    path.write_text(manifest.to_json(), encoding="utf-8")
    sync_path(path)
    for folder in {path.parent for path in (step_dir / name for name in names)} | {step_dir}:
        sync_path(folder)


def load_manifest(step_dir: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a step folder; UserError where it is missing, damaged or of an unknown version."""
    path = step_dir / name
    try:
        text = path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        kind = "checkpoint" if name == MANIFEST else "export"
        raise UserError(f"{step_dir} is not a complete MTLM {kind} (no {name}): {ADVICE[name]}") from None
    except UnicodeDecodeError:
        text = ""  # not JSON either: reported as damaged
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return Manifest.from_json(text, path)


def recorded_hash(step_dir: Path, name: str = MANIFEST) -> str:
    """The manifest's own sha256, which covers that of every file: what a folder is known by."""
    load_manifest(step_dir, name)
    return json.loads((step_dir / name).read_text(encoding="utf-8"))["sha256"]


def verify(step_dir: Path, name: str = MANIFEST) -> None:
    """Reads every file of a step folder and compares it with the manifest; UserError names the first
    that is missing, unexpected, of another size or does not match its sha256."""
    expected = load_manifest(step_dir, name).files
    present = _list_files(step_dir, name)

    def refuse(file: str, problem: str) -> None:
        raise UserError(f"{step_dir / file} {problem}, so it cannot be trusted: {ADVICE[name]}")

    # Names are compared before anything is opened, and only names found on the disk are: a manifest that
    # says `../x` leads nowhere.
    for file in sorted(expected.keys() - set(present)):
        if name == EXPORT_MANIFEST and file.endswith(".py"):
            continue  # transformers' code, which we neither run nor download
        refuse(file, "is missing")
    for file in sorted(set(present) - expected.keys()):
        refuse(file, f"is not listed in {name}")
    try:
        for file in present:
            size = (step_dir / file).stat().st_size
            if size != expected[file]["size"]:
                refuse(file, f"has {size} bytes where {name} says {expected[file]['size']}")
        found = hash_files(step_dir, present, sync=False)
    # A link that leads nowhere or in a circle, a folder that may not be read, a disk.
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    for file in present:
        if found[file] != expected[file]:
            refuse(file, f"does not match its sha256 in {name}")


def _list_files(step_dir: Path, manifest: str) -> list[str]:
    """Paths of everything under `step_dir` that is not a folder, but for the manifest; sorted.

    Hidden files count in a checkpoint (zarr has some); in an exported folder they are what git and the
    Hugging Face Hub keep next to it, and README.md is a card for its owner to edit.
    """
    paths = (path for path in step_dir.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(step_dir) for path in paths)
    if manifest == EXPORT_MANIFEST:
        names = (
            name
            for name in names
            if name.as_posix() != CARD and not any(part.startswith(".") for part in name.parts)
        )
    return sorted(name.as_posix() for name in names if name.as_posix() != manifest)


def hash_files(step_dir: Path, names: list[str], sync: bool) -> dict[str, Json]:
    """Size and sha256 of each file. hashlib releases the GIL, so threads use the cores there are."""

    def hash_file(name: str) -> Json:
        with (step_dir / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            content = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": content}

    found = {}
    megabytes = sum((step_dir / name).stat().st_size for name in names) / 1e6
    with (
        Activity("hashing the files" if sync else f"verifying {step_dir}", megabytes, "MB") as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for name, entry in zip(names, pool.map(hash_file, names), strict=True):
            found[name] = entry
            progress.advance(entry["size"] / 1e6)
    return found


def sync_path(path: Path) -> None:
    """Waits until a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
