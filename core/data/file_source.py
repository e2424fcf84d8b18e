"""The documents of one file: plain text, JSON or Parquet, compressed or not."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.data.formats import KNOWN, Form, Unpacked, format_of, open_unpacked
from core.data.rows import MISSING, RowText, find
from core.data.source import Source
from core.data.text import json_values, place, text_blocks
from core.errors import UserError

# A file of plain text is one document. A longer one is read as several of about this many characters, cut at
# a blank line (or the next best place), so that no file needs more memory than a few such pieces.
LONG_TEXT = 1 << 22

SEARCHED = 1000
"""Rows of a JSON file after which a field that none of them has is refused; at its end in a shorter one."""

# Files of these are read otherwise than by the first version, which lost what stood behind zero bytes between
# two streams: what was prepared of them then is not taken for what would be prepared now.
READ_ANEW = (".xz",)


class FileSource(Source):
    """A file of plain text (one document), JSON records (a text of each) or Parquet (a text of each row)."""

    def __init__(self, path: Path, rows: RowText, form: Form | None = None) -> None:
        """rows: what of a JSON record or of a Parquet file's row is its text.

        form: what the file holds, if its name does not say so.
        """
        self.path, self.rows = path, rows
        self.name = str(path)
        known, self._compression, _ = format_of(path)
        if form is None and known is None:
            raise UserError(
                f"{path} has an unknown format (known are {KNOWN}): if it is plain text, prepare it with "
                f"`python -m train_tpu.prepare {path} --format text --out DIR`"
            )
        self._form = form or known
        self.size = path.stat().st_size
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: permission denied")

    def identity(self) -> str:
        stat = self.path.stat()
        known = format_of(self.path).form
        marks = [mark for mark, holds in (
            (self._form, self._form != known), ("2", self._compression in READ_ANEW),
        ) if holds]  # fmt: skip
        return " ".join(
            [str(self.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns), self.rows.identity, *marks]
        )

    def documents(self) -> Iterator[tuple[str | None, int]]:
        read = {"text": self._texts, "json": self._records, "parquet": self._rows}[self._form]
        with open_unpacked(self.path) as file:
            yield from read(file)

    def _texts(self, file: Unpacked) -> Iterator[tuple[str, int]]:
        text, search = "", LONG_TEXT // 4
        for block in text_blocks(file.stream, self.path, LONG_TEXT):
            text += block
            while len(text) >= LONG_TEXT + search:
                cut = cut_point(text, LONG_TEXT, within=search)
                yield text[:cut], file.raw.tell()
                text = text[cut:]
        yield text, self.size

    def _records(self, file: Unpacked) -> Iterator[tuple[str | None, int]]:
        found: set[str] = set()
        lacking: dict[str, UserError] = {}  # of a field that no row had so far: what its first row says
        n = 0
        for n, (line, record) in enumerate(json_values(file.stream, self.path), 1):
            values = {name: find(record, name) for name in self.rows.names}
            for name, value in values.items():
                if value is MISSING and isinstance(record, dict):
                    if name not in found and name not in lacking:
                        lacking[name] = self._no_text(place(self.path, line), record, name)
                elif value is None or isinstance(value, str):
                    found.add(name)
                else:
                    raise self._no_text(place(self.path, line), record, name)
            if n == SEARCHED:
                self._require_found(found, lacking)
            whole = all(isinstance(value, str) for value in values.values())
            yield self.rows.join(values) if whole else None, file.raw.tell()
        if n:
            self._require_found(found, lacking)

    @staticmethod
    def _require_found(found: set[str], lacking: dict[str, UserError]) -> None:
        for name, error in lacking.items():
            if name not in found:
                raise error

    def _no_text(self, where: str, record: Any, name: str) -> UserError:
        """For a JSON value that has no text where it is looked for."""
        sentence = f"{where} has no text in the field {name!r}"
        if not isinstance(record, dict):
            return UserError(f"{sentence}, as it is {_kind(record)}: give a JSON object with a text per line")
        if (value := find(record, name)) is not MISSING and not isinstance(value, dict | list):
            return UserError(f"{sentence} but {_kind(value)}: remove such records, or give them a text")
        kinds = {name: "" if isinstance(v, str) else _kind(v) for name, v in record.items()}
        return UserError(f"{sentence} (its fields: {_listed(kinds)}): {_advice(kinds)}")

    def _rows(self, file: Unpacked) -> Iterator[tuple[str | None, int]]:
        import pyarrow
        import pyarrow.parquet

        with tempfile.TemporaryFile() as unpacked:
            if self._compression:  # Parquet is read from its end, which a compressed stream cannot do
                shutil.copyfileobj(file.stream, unpacked)
                unpacked.seek(0)
            try:
                table = pyarrow.parquet.ParquetFile(unpacked if self._compression else file.raw)
                paths = {name: self._column(table.schema_arrow, name) for name in self.rows.names}
                names = [".".join(path) for path in paths.values()]
                n_rows, row = table.metadata.num_rows, 0
                for batch in table.iter_batches(batch_size=64, columns=names):
                    columns = {name: _values(batch, path) for name, path in paths.items()}
                    for values in zip(*columns.values(), strict=True):
                        row += 1
                        texts = {
                            name: self._text_of(value, row, name)
                            for name, value in zip(columns, values, strict=True)
                            if value.is_valid
                        }
                        whole = len(texts) == len(columns)
                        yield self.rows.join(texts) if whole else None, self.size * row // n_rows
            except pyarrow.ArrowException as error:
                raise UserError(f"{self.path} cannot be read: {error}") from error

    def _column(self, schema: Any, name: str) -> list[str]:
        """Where a Parquet file has a field: the names of its columns, from the outermost on."""
        import pyarrow

        fields, path, rest = schema, [], name
        while True:
            found = {field.name: field.type for field in fields}
            key = rest if rest in found else rest.partition(".")[0]
            if key not in found:
                break
            path.append(key)
            if key == rest:
                if not _is_text(found[key]):
                    break
                return path
            if not pyarrow.types.is_struct(found[key]):
                break
            fields, rest = found[key].fields, rest.partition(".")[2]
        kinds = {column.name: "" if _is_text(column.type) else str(column.type) for column in schema}
        raise UserError(
            f"{self.path} has no text in the column {name!r} (its columns: {_listed(kinds)}): "
            f"{_advice(kinds)}"
        )

    def _text_of(self, value: Any, row: int, name: str) -> str:
        """The text of a value of a Parquet file's column, which may be of strings or of bytes."""
        try:
            text = value.as_py()
            return text if isinstance(text, str) else text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} row {row} is not UTF-8 text in the column {name!r} ({error.reason} at "
                f"offset {error.start}): convert it or leave it out"
            ) from None


def cut_point(text: str, at: int, within: int) -> int:
    """Where to cut `text` into two documents: after the first blank line in `within` characters from
    `at`, else after the first line there, else after the first space, else at `at`."""
    for border in ("\n\n", "\n", " "):
        found = text.find(border, at, at + within)
        if found >= 0:
            return found + len(border)
    return at


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value))}" if value else "an empty object"
    return {str: "a text", list: "a list"}.get(type(value), "a number")


def _listed(kinds: dict[str, str]) -> str:
    """Fields with what they hold if it is no text."""
    return ", ".join(f"{name} ({kind})" if kind else name for name, kind in kinds.items()) or "none"


def _advice(kinds: dict[str, str]) -> str:
    if "" in kinds.values():
        return (
            "name the right one with --field, or several with --template "
            "(`python -m train_tpu.prepare SOURCE --field NAME --out DIR`)"
        )
    return "none of them is a text: write the text into a field of its own"


def _values(batch: Any, path: list[str]) -> Any:
    """The values of a column, or of one within others."""
    import pyarrow.compute

    column = batch.column(path[0])
    return pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    return any(
        is_it(kind)
        for is_it in (
            types.is_string, types.is_large_string, types.is_string_view,
            types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
        )
    )  # fmt: skip
