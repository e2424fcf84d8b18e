"""Which files of a folder, or of a dataset repository, are its data; the others are named.

1. Hidden files, licences, readme files and their like, and what describes a dataset (`dataset_info.json`) are
   never data.
2. The split is told by whole words of the path within the folder: train, or one of `HELD_OUT`. No file of
   another split than train is trained on, and none of train is held out. In a repository, where splits are
   named by convention, files of no split are left out where there are files of the split that is wanted.
3. Data has one form. Records (Parquet or JSON, whichever has more bytes) go before plain text: a .txt file
   next to them is a list or a note.
4. Of a file that is there in several compressions one is read.

Files that are named, or found by a glob, are read whatever they are called.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from core.data.formats import Form, format_of

TRAIN = "train"
TRAIN_WORDS = {"train", "training", "trainset"}
HELD_OUT = {
    "dev", "devel", "devset", "eval", "evals", "evaluation", "heldout", "holdout", "test", "tests", "testing",
    "testset", "val", "valid", "validation", "valset",
}  # fmt: skip
DOCUMENTATION = {
    "authors", "changelog", "citation", "constraints", "contributing", "contributors", "copying", "credits",
    "licence", "license", "notice", "readme", "requirements", "robots",
}  # fmt: skip
DESCRIPTIONS = {"config", "dataset_dict", "dataset_info", "dataset_infos", "metadata", "state"}

NAMED = 3
"""How many files of a kind are named in a report."""


class File(NamedTuple):
    """A file of a folder or repository."""

    path: str
    """Within it, with slashes."""
    size: int
    """In bytes."""

    @property
    def suffix(self) -> str:
        """The last suffix of its name, with the dot; empty if it has none."""
        return PurePosixPath(self.path).suffix


class Choice(NamedTuple):
    """What is read, in order, and what is not."""

    read: list[File]
    left_out: dict[str, list[File]]
    """By the reason."""
    foreign: dict[str, list[File]]
    """Those of `left_out` that may have been meant: of another form than what is read, or of none known."""


def choose(
    files: Iterable[File], heldout: bool = False, form: Form | None = None, published: bool = False
) -> Choice:
    """Which of the files are data, by this module's rules.

    heldout: they are to be held out, not to be trained on.
    form: the form that is wanted; files of unknown formats are then taken to be of it.
    published: they are a repository's.
    """
    data: dict[File, Form] = {}
    left_out: dict[str, list[File]] = {}
    foreign: dict[str, list[File]] = {}
    for file in sorted(files, key=lambda file: PurePosixPath(file.path).parts):
        known = format_of(file.path).form or form
        if reason := _never_data(file.path):
            left_out.setdefault(reason, []).append(file)
        elif known is None:
            foreign.setdefault(f"of unknown format ({file.suffix or 'no suffix'})", []).append(file)
        else:
            data[file] = known

    splits = {file: split_of(file.path) for file in data}
    wanted = _wanted_splits(set(splits.values()), heldout, published)
    for file, split in splits.items():
        if split not in wanted:
            reason = f"of the split {split}" if split else "of no split"
            left_out.setdefault(reason, []).append(file)
            del data[file]

    sizes: dict[Form, int] = {}
    for file, kind in data.items():
        sizes[kind] = sizes.get(kind, 0) + file.size
    chosen = form or max(sizes, key=lambda kind: (kind != "text", sizes[kind], kind), default=None)
    read: dict[str, File] = {}
    for file, kind in data.items():
        plain = without_compression(file.path)
        if kind != chosen:
            foreign.setdefault(f"of the form {kind} (what is read is {chosen})", []).append(file)
        elif plain in read:
            left_out.setdefault("in another compression of a file that is read", []).append(file)
        else:
            read[plain] = file
    return Choice(list(read.values()), left_out | foreign, foreign)


def report(where: str, choice: Choice) -> str:
    """What was left out, for people, with what was read."""
    title = f"{where}: {describe(choice.read)} read; left out (name them or give a glob to read them):"
    groups = (f"  {describe(files)} {reason}" for reason, files in choice.left_out.items())
    return "\n".join([title, *groups])


def listed(groups: dict[str, list[File]]) -> str:
    """Files by their reasons, within a sentence."""
    return "; ".join(f"{describe(files)} {reason}" for reason, files in groups.items())


def total_size(groups: dict[str, list[File]]) -> int:
    """Bytes of all files."""
    return sum(file.size for files in groups.values() for file in files)


def describe(files: list[File]) -> str:
    """Their number and size, and the first names."""
    names = ", ".join(file.path for file in files[:NAMED]) + (", ..." if len(files) > NAMED else "")
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    return f"{count} ({sum(file.size for file in files):,} bytes: {names})"


def split_of(path: str) -> str | None:
    """The split that whole words of a path name, `train` or another one; None if none does.

    A path with both is of the other one: `train_test_split/test-0.jsonl`.
    """
    joined = re.sub(r"(held|hold)[^a-z]?out", r"\1out", path.lower())
    words = re.findall(r"[a-z]+", joined)
    held = next((word for word in reversed(words) if word in HELD_OUT), None)
    return held or (TRAIN if TRAIN_WORDS.intersection(words) else None)


def without_compression(path: str) -> str:
    """A path without the suffix of its compression."""
    return path[: -len(packed)] if (packed := format_of(path).compression) else path


def _wanted_splits(present: set[str | None], heldout: bool, published: bool) -> set[str | None]:
    fitting = {split for split in present if split is None or (split != TRAIN) == heldout}
    if heldout and not fitting:
        return present  # a train split that is held out as a whole
    named = fitting - {None}
    return named if published and named else fitting


def _never_data(path: str) -> str:
    """Why a file is none, whatever else is there; empty if it may be."""
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return "hidden"
    form, _, stem = format_of(path)
    name = stem.lower() if form else PurePosixPath(stem.lower()).stem
    first_word = re.split(r"[^a-z]", name)[0]  # license-apache, readme_en
    if form in ("text", None) and (name in DOCUMENTATION or first_word in ("licence", "license", "readme")):
        return "of documentation"
    if PurePosixPath(path).suffix == ".json" and name in DESCRIPTIONS:
        return "that describe data"
    return ""


class Walk(NamedTuple):
    """What lies below a folder."""

    files: list[File]
    unreadable: dict[str, list[File]]
    """What could not be looked at, by the reason; sizes are 0."""


def walk(folder: Path) -> Walk:
    """All files below a folder, those behind links included; each folder and each file once.

    Links back to a folder that is being read end there, and of several names of one file the first counts.
    """
    found = Walk([], {})
    seen: set[tuple[int, int]] = set()

    def unreadable(path: Path, reason: str) -> None:
        found.unreadable.setdefault(reason, []).append(File(path.relative_to(folder).as_posix(), 0))

    def visit(path: Path) -> None:
        try:
            stat = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            return unreadable(path, f"in folders that cannot be read ({error.strerror})")
        if (stat.st_dev, stat.st_ino) in seen:
            return unreadable(path, "under another name as well, which is read")
        seen.add((stat.st_dev, stat.st_ino))
        for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
            below = path / entry.name
            try:
                stat = entry.stat()
            except OSError as error:
                unreadable(below, f"behind broken links ({error.strerror})")
                continue
            if entry.is_dir() and entry.name.startswith("."):
                found.files.append(File(below.relative_to(folder).as_posix() + "/", 0))
            elif entry.is_dir():
                visit(below)
            elif not entry.is_file():
                unreadable(below, "that are not files")
            elif (stat.st_dev, stat.st_ino) in seen:
                unreadable(below, "under another name as well, which is read")
            else:
                seen.add((stat.st_dev, stat.st_ino))
                found.files.append(File(below.relative_to(folder).as_posix(), stat.st_size))
        return None

    visit(folder)
    return found
