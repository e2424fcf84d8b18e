"""`bench.finetune`: ours and TRL's learn from the same tokens, and what cannot be timed is refused."""

import json
import sys
from pathlib import Path

import pytest

from bench import finetune as command
from bench import finetune_rows
from core.chat import open_chat
from core.data.tuning_rows import read_rows
from core.errors import UserError
from core.tokenizer import load_tokenizer

N, CONTEXT = 6, 256


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Conversations too long for two of them to share a packed row, of either packer."""
    file = tmp_path / "dolly.jsonl"
    answers = ("word " * (21 + i) + f"number {i}" for i in range(N))
    file.write_text("".join(json.dumps({"instruction": "Say.", "response": a}) + "\n" for a in answers))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("ways", [("ours",), ("ours", "trl-sdpa", "trl-flash")])
def test_the_rows(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, ways: tuple[str, ...]):
    """A batch of all conversations: every way's first loss is their mean, with the same first weights."""
    if len(ways) > 1:
        pytest.importorskip("trl")
    monkeypatch.setattr(finetune_rows, "WARM_UP", 1)
    report = tmp_path / "bench.json"
    arguments = (rows, "--device", "cpu", "--preset", "mtlm1-tiny", "--tokenizer", "bytes", "--batch", N,
                 "--steps", 1, "--ways", *ways, "--json", report)  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench.finetune", *map(str, arguments)])

    def run_here(way: str, argv: list[str], folder: Path) -> command.Row:
        config = command.cli.parse(command.FinetuneBenchConfig, argv, prog="bench")
        return command.run_row(config, f"{way},{folder}")

    monkeypatch.setattr(command, "in_process", run_here)
    command.main()
    found = json.loads(report.read_text())["rows"]
    assert [row["way"] for row in found] == list(ways)
    chat = open_chat(load_tokenizer("bytes"), None, "chatml", tmp_path)
    tokens = sum(len(chat.encode(one)[0]) for one in read_rows(rows, chat=True).rows)
    for row in found:
        assert row["tokens"] == tokens
        # Means of 700 terms of about 6 in float32, in other orders.
        assert row["first_loss"] == pytest.approx(found[0]["first_loss"], abs=1e-5)
        assert row["loss"] < row["first_loss"] - 0.1
        assert row["loss"] == pytest.approx(found[0]["loss"], abs=1e-3)  # Adam's first updates are of size lr
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["milliseconds"] * 1e3)
    assert "port_torch.finetune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--ways", "trl-sdpa", "--device", "cpu"), "TRL is not installed"),
     (("--ways", "ours"), "needs an NVIDIA GPU")],
)  # fmt: skip
def test_refusals(rows: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.finetune", str(rows), *arguments])
    with pytest.raises(UserError, match=message):
        command.main()
