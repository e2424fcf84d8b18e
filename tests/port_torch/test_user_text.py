"""One rule for users' files in training, fine-tuning, generation and evaluation."""

import gzip
import json
from pathlib import Path

import pytest

from core.batch_file import read_prompts
from core.data.pieces import cut_into_pieces
from core.data.splits import make_plan
from core.data.text import read_text
from core.data.tuning_rows import read_rows
from core.errors import UserError
from eval.local_data import local_source, read_local

LAMBADA = "lambada/lambada_test_openai.jsonl"


def prepared(path: Path) -> list[str]:
    parts = make_plan([str(path)], {}, 0.0, None).parts
    return [
        d.decode() for part in parts for piece in cut_into_pieces(part.source, 50) for d in piece.documents
    ]


def evaluated(path: Path) -> list[str]:
    return [
        row["text"]
        for row in read_local("lambada_openai", local_source("lambada_openai"), path.parents[1]).splits[
            "test"
        ]
    ]


READERS = {
    "prepare": prepared,
    "finetune": lambda path: [row.response for row in read_rows(path).rows],
    "generate": lambda path: [row["prompt"] for row in read_prompts(path)],
    "eval": evaluated,
}


@pytest.mark.parametrize("reader", READERS)
def test_marks_compressions_and_lone_surrogates(tmp_path, capsys, reader):
    """A byte order mark is left out, a compressed file unpacked, and half a surrogate pair is U+FFFD and
    counted, in every field."""
    path = tmp_path / LAMBADA
    path.parent.mkdir()
    name = "prompt" if reader == "generate" else "text"
    content = f'\ufeff{{"{name}": "a \\ud83d b"}}\n{{"{name}": "\\ud83d\\ude00"}}\n'.encode()
    for file, written in ((path, content), (path.with_name(f"{path.name}.gz"), gzip.compress(content))):
        file.write_bytes(written)
        assert READERS[reader](file) == ["a \ufffd b", "\U0001f600"]
        if reader != "prepare":  # which sums them up over all files
            assert (
                f"{file}: replaced lone surrogates by U+FFFD, lines with them: 1" in capsys.readouterr().err
            )
        file.unlink()


@pytest.mark.parametrize("reader", READERS)
def test_other_encodings_are_refused_with_their_place(tmp_path, reader):
    path = tmp_path / LAMBADA
    path.parent.mkdir()
    name = "prompt" if reader == "generate" else "text"
    good = json.dumps({name: "a"}).encode() + b"\n"
    path.write_bytes(good + json.dumps({name: "é"}, ensure_ascii=False).encode("latin-1"))
    offset = len(good) + len(name) + 6
    with pytest.raises(UserError, match=rf"line 2 is not UTF-8 text \(byte 0xe9 at offset {offset}:.*LATIN1"):
        READERS[reader](path)
    path.write_bytes(json.dumps({name: "a"}).encode("utf-16"))
    with pytest.raises(UserError, match="is not UTF-8 text but UTF-16"):
        READERS[reader](path)


def test_a_text_to_score_is_read_by_the_same_rule(tmp_path):
    """eval.perplexity reads its --text with it."""
    (tmp_path / "a.raw").write_bytes(b"\xef\xbb\xbfa text")
    assert read_text(tmp_path / "a.raw") == "a text"
