"""Files of prompts: written as texts are made, resumed where they ended, and nothing of others' mixed in."""

import json
from pathlib import Path

import pytest

from core.batch_file import BatchFile, generation_settings, mark_of, read_prompts, write_texts
from core.errors import EXIT_INTERRUPTED, UserError
from core.sampling import Sampling
from core.tokenizer import load_tokenizer

LINES = [{"prompt": f"Number {i}", "id": i} for i in range(7)]
SETTINGS = generation_settings(Sampling(), 8, load_tokenizer("bytes"), "abc", dtype="float32")


def write(
    out: Path, stop_at: int = 99, lines: list = LINES, settings: dict = SETTINGS, batch: int = 2
) -> int:
    """Texts that say which prompt they are of; Ctrl-C comes at the batch that begins with that one."""

    def added(prompts: list[list[int]], first_row: int) -> list[list[str]]:
        if first_row >= stop_at:
            raise KeyboardInterrupt
        texts = [bytes(prompt).decode() for prompt in prompts]
        return [[f"<{first_row + i}" for i, _ in enumerate(texts)], [f" {text}>" for text in texts]]

    prompts = [list(line["prompt"].encode()) for line in lines]
    return write_texts(out, lines, prompts, 2, settings, added)


def test_an_interrupted_file_is_resumed(tmp_path: Path, capsys):
    """Wherever it ended, also within a line, it becomes what it would have been."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert write(whole) == 0 and not mark_of(whole).exists()
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert rows == [line | {"text": f"<{i} Number {i}>"} for i, line in enumerate(LINES)]
    assert write(out, stop_at=4) == EXIT_INTERRUPTED
    assert "4 of 7 prompts are in" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 4 and mark_of(out).exists()
    BatchFile(batch_file=whole, out=out)  # it may be given again
    content = whole.read_bytes()
    for length in (len(out.read_bytes()), len(content), len(content) - 5, 20, 0):
        out.write_bytes(content[:length])
        mark_of(out).write_text(json.dumps({"prompts": prompts_hash(tmp_path)} | SETTINGS))
        assert write(out) == 0
        assert out.read_bytes() == content and not mark_of(out).exists()
    with pytest.raises(UserError, match="exists already"):
        BatchFile(batch_file=whole, out=out)


def prompts_hash(folder: Path) -> str:
    assert write(folder / "begun", stop_at=2) == EXIT_INTERRUPTED
    return json.loads(mark_of(folder / "begun").read_text())["prompts"]


def test_what_was_begun_otherwise_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    write(out, stop_at=4)
    kept = out.read_bytes()
    other = generation_settings(Sampling(seed=1), 8, load_tokenizer("bytes"), "abc", dtype="float32")
    with pytest.raises(UserError, match=r"was started with different seed \(0, not 1\)"):
        write(out, settings=other)
    with pytest.raises(UserError, match="was started with different prompts"):
        write(out, lines=LINES[:6])
    out.write_bytes(kept.replace(b"Number 1", b"Number 9"))
    with pytest.raises(UserError, match="line 2 is not a text of prompt 2"):
        write(out)
    assert out.read_bytes() == kept.replace(b"Number 1", b"Number 9")


def test_nothing_stays_where_nothing_was_done(tmp_path: Path):
    assert write(tmp_path / "out", stop_at=0) == EXIT_INTERRUPTED
    assert not list(tmp_path.iterdir())


def test_lines_that_are_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    for content, message in (
        ('{"prompt": "a"}\n{"prompt": "b", "text": "c"}', 'line 2 has a field "text", which'),
        ('{"prompt": 3}', "line 1 is not an object with a text"), ("", "is empty"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
    path.write_text('{"prompt": "The", "id": "\\ud83d"}\n{"prompt": "A"}')  # half of a surrogate pair
    lines = read_prompts(path)
    assert write(tmp_path / "out", lines=lines) == 0
    assert [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()] == [
        "<0 The>",
        "<1 A>",
    ]
    with pytest.raises(UserError, match="there is no folder"):
        BatchFile(batch_file=path, out=tmp_path / "no" / "out")
