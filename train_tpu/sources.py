"""Where documents come from: text files, the built-in corpus, TFDS and Hugging Face datasets.

`open_sources` turns names into `Source`s. Each yields its documents in a fixed order, holds little more
than one of them in memory, and says how far it is. What cannot be read is a `UserError` that names the
file and the line; nothing is skipped silently.
"""

import abc
import fnmatch
import glob
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError
from train_tpu import corpus

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
SUFFIXES = tuple(form + packed for form in FORMATS for packed in COMPRESSIONS)

# A .txt file is one document. A longer one is read as several of about this many characters, cut at a
# blank line (or the next best place), so that no file needs more memory than a few such pieces.
LONG_TEXT = 1 << 22


class Source(abc.ABC):
    """Documents under one name."""

    name: str
    size: int
    """What `documents` counts its position in: bytes on disk where there are any, else documents."""

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, int]]:
        """(text, position in 0..size after it) of every document, empty ones included."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Changes when the documents do, as far as can be told without reading them."""


def open_sources(names: list[str], field: str = "text") -> list[Source]:
    """The sources of `names` in the given order; folders and globs become their files, sorted.

    names: files, folders, globs, `builtin`, `tfds:NAME`, `hf:DATASET[:CONFIG]`.
    field: the JSON field, Parquet column or TFDS feature that holds the text.
    """
    return [source for name in names for source in _open(name, field)]


def _open(name: str, field: str) -> list[Source]:
    if name == "builtin":
        return [BuiltinSource()]
    if name.startswith("tfds:"):
        return [TfdsSource(name, field)]
    if name.startswith("hf:"):
        return [HubSource(name, field)]
    path = Path(name)
    if path.is_dir():
        if (path / "dataset.json").exists():
            raise UserError(f"{path} is a prepared dataset, not text: give it to train_tpu.run as --data")
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(SUFFIXES)]
        if not found:
            raise UserError(f"the folder {path} holds no text: expected files named *{', *'.join(FORMATS)}")
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]  # noqa: PTH207
        if not found:
            raise UserError(f"there is no file, folder or glob {name!r}: give the path of your text")
    return [FileSource(file, field) for file in found]


class FileSource(Source):
    """A .txt (one document), .jsonl (a field of every line) or .parquet file, compressed or not."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field
        self.name = str(path)
        plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
        self._packed, self._form = (path.suffix if plain != path else ""), plain.suffix
        if self._form not in FORMATS:
            raise UserError(
                f"{path} is of no known format: expected {', '.join(FORMATS)}, also as .gz, .xz or .zst"
            )
        self.size = path.stat().st_size

    def identity(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {self.field}"

    def documents(self) -> Iterator[tuple[str, int]]:
        import pyarrow

        read = {".txt": self._texts, ".jsonl": self._json_lines, ".parquet": self._parquet_rows}[self._form]
        try:
            with self.path.open("rb") as raw, self._unpacked(raw) as stream:
                yield from read(stream, raw)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error

    def _unpacked(self, raw: io.BufferedReader) -> io.BufferedIOBase:
        if self._packed == ".gz":
            return gzip.open(raw)
        if self._packed == ".xz":
            return lzma.open(raw)
        if self._packed == ".zst":  # Arrow's reader, unlike zstandard's, notices a truncated file
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        return raw

    def _texts(self, stream: io.BufferedIOBase, raw: io.BufferedReader) -> Iterator[tuple[str, int]]:
        reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        text, end = "", False
        while not end:
            try:
                block = reader.read(LONG_TEXT)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.path} is not UTF-8 text ({error.reason} before byte {stream.tell()}): convert it"
                ) from error
            text, end = text + block, not block
            search = LONG_TEXT // 4
            if not end and len(text) >= LONG_TEXT + search:
                cut = cut_point(text, LONG_TEXT, within=search)
                yield text[:cut], raw.tell()
                text = text[cut:]
        yield text, self.size

    def _json_lines(self, stream: io.BufferedIOBase, raw: io.BufferedReader) -> Iterator[tuple[str, int]]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path} line {number} is not JSON ({error}): correct it") from error
            if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
                fields = ", ".join(record) if isinstance(record, dict) else "none"
                raise UserError(
                    f"{self.path} line {number} has no text in the field {self.field!r} "
                    f"(its fields: {fields}): name the right one with --field"
                )
            yield record[self.field], raw.tell()

    def _parquet_rows(self, stream: io.BufferedIOBase, raw: io.BufferedReader) -> Iterator[tuple[str, int]]:
        import pyarrow.parquet

        with tempfile.TemporaryFile() as unpacked:
            if self._packed:  # Parquet is read from its end, which a compressed stream cannot do
                shutil.copyfileobj(stream, unpacked)
                unpacked.seek(0)
            file = pyarrow.parquet.ParquetFile(unpacked if self._packed else stream)
            if self.field not in file.schema_arrow.names:
                raise UserError(
                    f"{self.path} has no column {self.field!r} (its columns: "
                    f"{', '.join(file.schema_arrow.names)}): name the right one with --field"
                )
            n_rows, row = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=64, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{self.path} row {row} has no text in the column {self.field!r}")
                    yield text, self.size * row // n_rows


def cut_point(text: str, at: int, within: int) -> int:
    """Where to cut `text` into two documents: after the first blank line in `within` characters from
    `at`, else after the first line there, else after the first space, else at `at`."""
    for border in ("\n\n", "\n", " "):
        found = text.find(border, at, at + within)
        if found >= 0:
            return found + len(border)
    return at


class BuiltinSource(Source):
    """The built-in corpus: docstrings of the installed Python packages."""

    name = "builtin"

    def __init__(self) -> None:
        self.size = corpus.n_files()

    def identity(self) -> str:
        return f"builtin {corpus.identity()}"

    def documents(self) -> Iterator[tuple[str, int]]:
        yield from corpus.documents_with_position()


class TfdsSource(Source):
    """The train split of a dataset of the TFDS catalogue, or of TFDS's data folder."""

    def __init__(self, name: str, field: str) -> None:
        import tensorflow_datasets as tfds

        self.name, self._field = name, field
        dataset = name.removeprefix("tfds:")
        try:
            builder = tfds.builder(dataset, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UserError(f"TFDS knows no dataset {dataset!r}: see its catalogue for the names") from error
        except (ImportError, NotImplementedError) as error:
            raise _needs_tensorflow(name, error) from error
        try:
            builder.download_and_prepare()
            self._records = builder.as_data_source("train")
        except (ImportError, NotImplementedError) as error:
            raise _needs_tensorflow(name, error) from error
        except Exception as error:  # the network's, the disk's, the dataset's own
            raise UserError(f"{name} could not be loaded through TFDS: {error}") from error
        if field not in builder.info.features:
            raise UserError(
                f"{name} has no feature {field!r} (its features: {', '.join(builder.info.features)}): "
                "name the right one with --field"
            )
        self._version = str(builder.info.full_name)
        self.size = len(self._records)

    def identity(self) -> str:
        return f"tfds {self._version} {self._field} {self.size}"

    def documents(self) -> Iterator[tuple[str, int]]:
        for index in range(self.size):
            text = self._records[index][self._field]
            if not isinstance(text, bytes | str):
                raise UserError(
                    f"{self.name} has no text in the feature {self._field!r}: name one with --field"
                )
            yield text if isinstance(text, str) else text.decode("utf-8", "replace"), index + 1


def _needs_tensorflow(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be built without TensorFlow ({error}): "
        "install it (pip install tensorflow) or give the text as files"
    )


class HubSource(Source):
    """The data files of a dataset repository on the Hugging Face hub, downloaded one by one."""

    def __init__(self, name: str, field: str) -> None:
        self.name, self._field = name, field
        self._dataset, _, config = name.removeprefix("hf:").partition(":")
        self._revision, self._files = _hub_files(self._dataset, config)
        self.size = sum(self._files.values())

    def identity(self) -> str:
        return f"hf {self._dataset} {self._revision} {' '.join(self._files)} {self._field}"

    def documents(self) -> Iterator[tuple[str, int]]:
        before = 0
        for file, size in self._files.items():
            path = _hub_download(self._dataset, file, self._revision)
            for text, position in FileSource(path, self._field).documents():
                yield text, before + position
            before += size


def _hub_files(dataset: str, config: str) -> tuple[str, dict[str, int]]:
    """The repository's commit, and its data files with their sizes in bytes, sorted by path.

    dataset: its name, such as `roneneldan/TinyStories`.
    config: one configuration by its name on the dataset's page (`sample-10BT`), or a folder of the repository
    (`20231101.en`); empty for the whole repository.
    Of files that are sorted into splits only those of the train split are taken.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(dataset, files_metadata=True)
    except Exception as error:  # httpx, offline mode, a missing or closed repository
        raise _unreachable(dataset, error) from error
    files = {f.rfilename: f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(SUFFIXES)}
    if config:
        patterns = _config_patterns(info.card_data, config)
        files = {
            f: size
            for f, size in files.items()
            if config in Path(f).parts[:-1] or any(fnmatch.fnmatchcase(f, pattern) for pattern in patterns)
        }
    files = {f: size for f, size in files.items() if "train" in f.lower()} or files
    if not files:
        where = f"its configuration or folder {config!r}" if config else "it"
        raise UserError(
            f"the dataset {dataset} has no {', '.join(FORMATS)} file in {where}: see its page for them"
        )
    return info.sha, dict(sorted(files.items()))


def _config_patterns(card: Any, config: str) -> list[str]:
    """The patterns of paths that the head of a dataset's page gives for a configuration's train split.

    There `data_files` is a pattern, a list of them, or a list of {split, path} with a pattern or a list each.
    """
    listed = (card.get("configs") if card else None) or []
    found = []
    for entry in listed:
        if entry.get("config_name") != config:
            continue
        given = entry.get("data_files") or []
        for files in [given] if isinstance(given, str) else given:
            if isinstance(files, dict):
                files = files.get("path") if files.get("split") == "train" else []
            found += [files] if isinstance(files, str) else files or []
    return found


def _hub_download(dataset: str, file: str, revision: str) -> Path:
    """The local path of one file, downloaded unless the hub's cache has it."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(dataset, file, repo_type="dataset", revision=revision))
    except Exception as error:
        raise _unreachable(f"{dataset}/{file}", error) from error


def _unreachable(what: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"{what} cannot be had from the Hugging Face hub ({reason}): check the name and the network, "
        "or give files that are on this machine"
    )
