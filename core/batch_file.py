"""A file of prompts becomes a file of texts, for the commands that generate and converse.

Texts are written as they are made. While some are missing, `OUT.unfinished` next to them says what they are
made of, and the same command resumes where it ended; the texts are those of a run that was not interrupted.
"""

import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from core import checks
from core.data.conversations import Turn, read_question
from core.data.text import read_json_lines
from core.errors import EXIT_INTERRUPTED, UserError
from core.folders import write_atomically
from core.progress import Activity
from core.sampling import Sampling
from core.tokenizer import Tokenizer

Json = dict[str, Any]
FORM = 'give one line {"prompt": "..."} per text'


@dataclasses.dataclass(frozen=True)
class BatchFile:
    """Texts for a whole file of prompts."""

    batch_file: Path | None = None
    """Prompts from a JSONL file: one object {"prompt": "..."} per line; other fields are kept. A row of a
    conversation may have its turns in {"messages"} instead."""
    out: Path | None = None
    """Where the texts of --batch-file go: the same lines with the field "text". The same command resumes."""
    batch: int = 16
    """Prompts of --batch-file per batch; it does not change their texts."""

    def __post_init__(self) -> None:
        checks.counts(batch=self.batch)
        if (self.batch_file is None) != (self.out is None):
            raise UserError("--batch-file and --out go together: give both or neither")
        if self.out is None:
            return
        if self.out.exists() and not mark_of(self.out).exists():
            raise UserError(f"--out {self.out} exists already: give another name, or remove it first")
        if not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.absolute().parent}")

    def read(self, prompts: list[str]) -> list[Json]:
        """The lines of the file; none if none is given.

        prompts: given on the command line.

        Raises:
            UserError: prompts are given, too, or a line, which it names, has no text `prompt`.
        """
        if self.batch_file is None:
            return []
        if prompts:
            raise UserError("give --prompt or --batch-file, not both")
        return read_prompts(self.batch_file)

    def questions(self) -> tuple[list[Json], list[tuple[Turn, ...]]]:
        """The lines of the file and the turns in each; none if none is given. Names what is not used.

        Raises:
            UserError: a line, which it names, is no question (`read_question`).
        """
        if self.batch_file is None:
            return [], []
        lines, questions, unused = [], [], set()
        for where, line in _objects(self.batch_file):
            question = read_question(line, where)
            lines.append(line)
            questions.append(question.turns)
            unused |= question.unused
        if unused:
            print(f"not used: {', '.join(sorted(unused))}", file=sys.stderr)
        return lines, questions


def read_prompts(path: Path) -> list[Json]:
    """The objects of a JSONL file, each with a text `prompt`; a UserError names the line that is not one."""
    lines = []
    for where, line in _objects(path):
        if not isinstance(line.get("prompt"), str):
            raise UserError(f'{where} is not an object with a text "prompt": {FORM}')
        lines.append(line)
    return lines


def _objects(path: Path) -> Iterator[tuple[str, Json]]:
    """(where it is, object) of every line of a JSONL file, which must not have what is written into it."""
    where = None
    for where, content in read_json_lines(path):
        if not isinstance(content, dict):
            raise UserError(f'{where} is not an object with a text "prompt": {FORM}')
        if "text" in content:
            raise UserError(f'{where} has a field "text", which its text would replace: rename the field')
        yield where, content
    if where is None:
        raise UserError(f"{path} is empty: {FORM}")


def mark_of(out: Path) -> Path:
    """The file next to `out` that is there while texts are missing: it holds what they are made of."""
    return out.with_name(f"{out.name}.unfinished")


def generation_settings(
    sampling: Sampling, max_new_tokens: int, tokenizer: Tokenizer, model: str, **more: str | None
) -> Json:
    """Everything that texts depend on besides their prompts.

    model: what proves which it is, a hash; more: how it is computed.
    """
    return {
        "model": model,
        "tokenizer": tokenizer.sha256,
        "max_new_tokens": max_new_tokens,
        **dataclasses.asdict(sampling),
        **more,
    }


def write_texts(
    out: Path,
    lines: list[Json],
    prompts: list[list[int]],
    batch: int,
    settings: Json,
    added: Callable[[list[list[int]], int], Iterable[list[str]]],
) -> int:
    """Writes every line with its "text"; returns the exit code, 130 where Ctrl-C came first.

    Args:
        prompts: the ids that each line's text continues.
        settings: of `generation_settings`; they are those that `out` was begun with.
        added: (some of the prompts, the number of the first of them) -> what is added to each, step by step.

    Raises:
        UserError: `out` was started with different prompts or settings, or another process writes it.
    """
    lines_hash = hashlib.sha256("".join(map(_canonical, lines)).encode()).hexdigest()
    settings = {"prompts": lines_hash} | settings
    mark = mark_of(out)
    if mark.exists():
        _require_same(mark, out, settings)
    else:
        write_atomically(mark, json.dumps(settings, indent=1) + "\n")
    with out.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing {out}: wait for it, or give another --out") from None
        n_done = _keep_whole_batches(file, out, lines, batch)
        if n_done:
            print(f"resuming {out}: {n_done} of {len(lines)} prompts are there", file=sys.stderr)
        try:
            with Activity("sampling", len(lines), "texts", done=n_done) as progress:
                while n_done < len(lines):
                    part = lines[n_done : n_done + batch]
                    columns = list(added(prompts[n_done : n_done + batch], n_done))
                    texts = ["".join(row) for row in zip(*columns, strict=True)]
                    rows = (line | {"text": text} for line, text in zip(part, texts, strict=True))
                    written = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    file.write("".join(written).encode())
                    file.flush()
                    n_done += len(part)
                    progress.advance(len(part))
        except KeyboardInterrupt:
            kept = f"{n_done} of {len(lines)} prompts are in {out}" if n_done else "nothing was done yet"
            print(f"interrupted: {kept}; the same command resumes", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            if n_done in (0, len(lines)):
                mark.unlink()
            if not n_done:
                out.unlink()
    print(f"wrote {out}", file=sys.stderr)
    return 0


def _require_same(mark: Path, out: Path, settings: Json) -> None:
    """A UserError naming the first setting that is not the one that `out` was begun with."""
    anew = f"give another --out, or remove {out} and {mark} to begin again"
    try:
        begun = json.loads(mark.read_text(encoding="utf-8"))
        differing = [name for name in begun.keys() | settings.keys() if begun.get(name) != settings.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{mark} cannot be read ({error}): {anew}") from None
    if differing:
        name = min(differing, key=list(settings | begun).index)
        was, now = (str(values.get(name))[:20] for values in (begun, settings))
        what = "prompts" if name == "prompts" else f"{name.replace('_', ' ')} ({was}, not {now})"
        raise UserError(f"{out} was started with different {what}: {anew}")


def _keep_whole_batches(file: Any, out: Path, lines: list[Json], batch: int) -> int:
    """Cuts the file off after its last whole batch, so that a resumed run forms the same batches; returns the
    number of rows kept.

    Raises:
        UserError: a row is not that of its prompt.
    """
    file.seek(0)
    whole = file.read().split(b"\n")[:-1]  # what no line feed ends was cut off by a kill
    n_done = len(whole) if len(whole) == len(lines) else len(whole) - len(whole) % batch
    for number, (row, line) in enumerate(zip(whole, lines, strict=False), 1):
        try:
            there = json.loads(row)
            text = there.pop("text")
            same = isinstance(text, str) and _canonical(there) == _canonical(line)
        except (ValueError, KeyError, AttributeError):
            same = False
        if not same:
            raise UserError(f"{out}, line {number} is not a text of prompt {number}: give another --out")
    if len(whole) > len(lines):
        raise UserError(f"{out} has {len(whole)} lines for {len(lines)} prompts: give another --out")
    file.truncate(sum(len(row) + 1 for row in whole[:n_done]))
    return n_done


def _canonical(row: Json) -> str:
    return json.dumps(row, sort_keys=True)
