"""Where documents come from: text files, the built-in corpus, TFDS and Hugging Face datasets.

`open_sources` turns names into `Source`s. Each yields its documents in a fixed order, holds little more
than one of them in memory, and says how far it is. What cannot be read is a `UserError` that names the
file and the line; what is not read is said.
"""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from core.data import corpus
from core.data.data_files import choose, describe, listed, report, total_size, walk, without_compression
from core.data.file_source import FileSource
from core.data.formats import KNOWN, Form, format_of
from core.data.hub_source import HubSource
from core.data.rows import MISSING, RowText, find
from core.data.source import Source
from core.errors import UserError
from core.hub_models import PREFIX as HUB

TFDS = "tfds:"


def open_sources(
    names: list[str],
    field: str = "text",
    form: Form | None = None,
    heldout: bool = False,
    say: Callable[[str], None] = print,
    template: str | None = None,
) -> list[Source]:
    """The sources of `names` in the given order; folders and globs become their files, sorted.

    names: files, folders, globs, `builtin`, `tfds:NAME`, `hf:DATASET[:CONFIG]`.
    field: the JSON field, Parquet column or TFDS feature that holds the text (`core.data.rows`).
    form: what files hold, whatever their names say.
    heldout: whether they are to be held out, and not to be trained on (`data_files`).
    say: what tells the user which files are not read.
    template: how the text is made of several fields, instead of `field`.
    """
    rows = RowText(field, template)
    found: dict[str, Source] = {}
    for name in names:
        for source in _open(name, rows, form, heldout, say):
            first = found.setdefault(_what_it_is(source), source)
            if first is not source:
                say(f"{source.name} is left out: {first.name}, which is the same or a copy of it, is read")
    return list(found.values())


def names_data_set(name: str) -> bool:
    """Whether --data names a data set of TFDS or the Hugging Face Hub, not files."""
    return name.startswith((TFDS, HUB))


def _what_it_is(source: Source) -> str:
    """The same for sources that hold the same documents, by their names."""
    if isinstance(source, FileSource):
        return without_compression(str(source.path.resolve()))
    return source.identity()


def _open(
    name: str, rows: RowText, form: Form | None, heldout: bool, say: Callable[[str], None]
) -> list[Source]:
    if name == "builtin":
        return [BuiltinSource()]
    if name.startswith(TFDS):
        return [TfdsSource(name, rows)]
    if name.startswith(HUB):
        return [HubSource(name, rows, form, heldout, say)]
    path = Path(name)
    if path.is_dir():
        found = _files_of(path, form, heldout, say)
    elif path.is_file():
        found = [path]
    else:
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        found = [match for match in matches if match.is_file()]
        if not found:
            if path.is_symlink():
                raise UserError(f"{path} is a broken link: fix it, or give the path of your text")
            raise UserError(f"there is no file, folder or glob {name!r}: give the path of your text")
        if "**" not in name and (n_others := len(matches) - len(found)):
            say(f"{name}: left out {n_others:,} that are not files (** in a glob searches folders too)")
    return [FileSource(file, rows, form) for file in found]


def _files_of(folder: Path, form: Form | None, heldout: bool, say: Callable[[str], None]) -> list[Path]:
    """The files of a folder that are its data; says what the others are.

    Raises:
        UserError: it holds no data, or most of it is in files that are not read.
    """
    if (folder / "dataset.json").exists():
        raise UserError(f"{folder} is a prepared dataset, not text: give it to train_tpu.run as --data")
    files, unreadable = walk(folder)
    choice = choose(files, heldout, form)
    choice = choice._replace(left_out=choice.left_out | unreadable)
    if not choice.read:
        but = f", but {listed(choice.left_out)}" if choice.left_out else ""
        raise UserError(
            f"the folder {folder} holds no text to {'hold out' if heldout else 'train on'}{but}: known are "
            f"{KNOWN}; give other plain text with --format text to train_tpu.prepare, and single files by "
            "their names"
        )
    if total_size(choice.foreign) > total_size({"": choice.read}):
        name = PurePosixPath(choice.read[0].path).name
        suffixes = name.removeprefix(format_of(name).stem)
        raise UserError(
            f"most of the folder {folder} would not be read: {listed(choice.foreign)}; only "
            f"{describe(choice.read)} would be: give the files that you mean by a glob such as "
            f"'{folder}/**/*{suffixes}'"
        )
    if choice.left_out:
        say(report(str(folder), choice))
    return [folder / file.path for file in choice.read]


class BuiltinSource(Source):
    """The built-in corpus: docstrings of the installed Python packages."""

    name = "builtin"
    one_reader = True

    def __init__(self) -> None:
        self.size = corpus.n_files()

    def identity(self) -> str:
        return f"builtin {corpus.identity()}"

    def documents(self) -> Iterator[tuple[str, int]]:
        yield from corpus.documents()


class TfdsSource(Source):
    """The train split of a dataset of the TFDS catalogue, or of TFDS's data folder."""

    def __init__(self, name: str, rows: RowText) -> None:
        import tensorflow_datasets as tfds

        self.name, self._rows = name, rows
        dataset = name.removeprefix(TFDS)
        try:
            builder = tfds.builder(dataset, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UserError(f"unknown TFDS dataset {dataset!r}: see the TFDS catalogue for names") from error
        except (ImportError, NotImplementedError) as error:
            raise _needs_tensorflow(name, error) from error
        try:
            builder.download_and_prepare()
            self._records = builder.as_data_source("train")
        except (ImportError, NotImplementedError) as error:
            raise _needs_tensorflow(name, error) from error
        except Exception as error:  # the network's, the disk's, the dataset's own
            raise UserError(f"{name} could not be loaded through TFDS: {error}") from error
        known = builder.info.features
        if lacking := [field for field in rows.names if _feature(known, field) is MISSING]:
            raise UserError(
                f"{name} has no feature {lacking[0]!r} (its features: {', '.join(builder.info.features)}): "
                "name the right one with --field"
            )
        self._version = str(builder.info.full_name)
        self.size = len(self._records)

    def identity(self) -> str:
        return f"tfds {self._version} {self._rows.identity} {self.size}"

    def __reduce__(self):
        return TfdsSource, (self.name, self._rows)

    def documents(self) -> Iterator[tuple[str, int]]:
        for index in range(self.size):
            row = self._records[index]
            texts = {name: self._text(find(row, name), name) for name in self._rows.names}
            yield self._rows.join(texts), index + 1

    def _text(self, value: object, name: str) -> str:
        if not isinstance(value, bytes | str):
            raise UserError(f"{self.name} has no text in the feature {name!r}: name one with --field")
        # What is not UTF-8 becomes lone surrogates, which whoever reads this replaces and counts.
        return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def _feature(features: Any, name: str) -> Any:
    """A feature, or one within others, by its name; `MISSING` if there is none."""

    def plain(value: Any) -> Any:
        return {key: plain(inner) for key, inner in value.items()} if hasattr(value, "items") else value

    return find(plain(features), name)


def _needs_tensorflow(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be built without TensorFlow ({error}): "
        "install it (pip install tensorflow) or give the text as files"
    )
