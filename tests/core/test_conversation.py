"""A conversation with a model that answers what it is told to: turns, commands, cuts, and Ctrl-C."""

import io
import os
import pty
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.batch_file import BatchFile, generation_settings
from core.chat import Template, choose_template, open_chat, open_template, require_template
from core.conversation import HELP, Answers, Session, answer_file, converse, obey
from core.data.conversations import Turn, read_question
from core.errors import UserError, run_command
from core.sampling import Sampling, until_ended
from core.tokenizer import load_tokenizer
from core.tokenizer_json import as_library
from tests.core.test_chat import GEMMA

SILENT = (
    "{% for message in messages if message['role'] != 'system' %}{{ message['content'] + eos_token }}"
    "{% endfor %}"
)


class Told:
    """A model that gives the answers it is told, and knows what it was asked with."""

    def __init__(self, folder: Path, *answers: str | bytes | type, context: int = 1000, longest: int = 100):
        self.said = list(answers)
        self.prompts: list[list[int]] = []
        self.numbers: list[int] = []
        chat = open_chat(load_tokenizer("bytes"), None, "chatml", folder)
        self.answers = Answers(chat, context, longest, self.stream)
        self.session = Session(self.answers, None)

    def stream(
        self, prompts: list[list[int]], first_row: int, ends: Sequence[int]
    ) -> Iterator[list[int | None]]:
        self.prompts += prompts
        self.numbers.append(first_row)
        rows = [self._tokens(self.said.pop(0), ends) for _ in prompts]
        steps = zip(*rows, strict=False)
        return until_ended(map(list, steps), prompts, self.answers.context, self.answers.max_new_tokens, ends)

    def _tokens(self, answer: str | bytes, ends: Sequence[int]) -> Iterator[int]:
        yield from answer.encode() if isinstance(answer, str) else answer
        if isinstance(answer, str):
            yield from ends[:1] * 1000
        raise KeyboardInterrupt

    def asked(self) -> list[str]:
        """What it was asked with, as text."""
        library = as_library(self.answers.chat.tokenizer)
        whole = [library.decode(prompt, skip_special_tokens=False) for prompt in self.prompts]
        shorter = {"<s>": "", "<|im_start|>": "[", "<|im_end|>\n": "]"}
        return [re.sub("|".join(map(re.escape, shorter)), lambda m: shorter[m[0]], text) for text in whole]


def talk(monkeypatch, capfd, told: Told, piped: str | bytes) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a conversation over lines that are piped in."""
    content = piped.encode() if isinstance(piped, str) else piped
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code = converse(told.session, "a model")
    return code, *capfd.readouterr()


def test_piped_lines_and_every_command(tmp_path: Path, monkeypatch, capfd):
    told = Told(tmp_path, "Yes.", "No.\nNever.", "ééé", "", "d", "e")
    lines = (
        "one\r\n\n  two \n/system Be brief.\nthree\n/reset\n /four\n/system\nfive\n/help\n/wrong\n/exit now\n"
        "six\n/exit\nseven\n"
    )
    code, out, err = talk(monkeypatch, capfd, told, lines)
    assert out == "Yes.\nNo.\nNever.\nééé\n\nd\ne\n"
    one = "[user\none][assistant\n"
    two = f"{one}Yes.][user\ntwo][assistant\n"
    four = "[user\n/four][assistant\n"
    assert told.asked() == [
        one,
        two,
        f"[system\nBe brief.]{two}No.\nNever.][user\nthree][assistant\n",
        f"[system\nBe brief.]{four}",
        f"{four}][user\nfive][assistant\n",
        f"{four}][user\nfive][assistant\nd][user\nsix][assistant\n",
    ]
    assert told.numbers == list(range(6))  # each answer has random numbers of its own
    assert code == 2 and "there is no command '/wrong'" in err and "there is no command '/exit now'" in err
    assert HELP in err and "(a model)" in err


def test_the_end_of_the_input_ends_it(tmp_path: Path, monkeypatch, capfd):
    told = Told(tmp_path, "a")
    assert talk(monkeypatch, capfd, told, "no line end")[:2] == (0, "a\n")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert converse(told.session, "a model") == 0
    with pytest.raises(UserError, match="line 2 of the input is not UTF-8"):
        talk(monkeypatch, capfd, Told(tmp_path, "a"), b"a\n\xff\n")


def test_no_half_character_is_shown(tmp_path: Path):
    told = Told(tmp_path, "né🙂")
    assert [piece for piece in told.session.ask("?") if piece] == ["n", "é", "🙂"]
    cut = Told(tmp_path, "né🙂", longest=5)
    assert "".join(cut.session.ask("?")) == "né\ufffd" and "--max-new-tokens" in cut.session.ended_by


def test_an_answer_ends_at_the_context(tmp_path: Path, monkeypatch, capfd):
    told = Told(tmp_path, "a" * 100, context=40)
    _, out, err = talk(monkeypatch, capfd, told, "?\n")
    assert out == "a" * (40 - len(told.prompts[0])) + "\n" and "ended by the context" in err
    assert told.session.turns[-1].content == out[:-1]


def test_cuts_are_those_of_brute_force(tmp_path: Path, capfd):
    """Every conversation is asked with the longest end of it that leaves its room, and each cut is said."""
    rng, context, longest = random.Random(0), 220, 60
    told = Told(tmp_path, context=context, longest=longest)
    chat, n_cuts = told.answers.chat, 0
    for system in (None, "Be brief."):
        session, kept = Session(told.answers, system), []
        for _ in range(10):
            question, answer = (rng.choice("xyé") * rng.randint(1, 45) for _ in range(2))
            told.said.append(answer)
            ends = [kept[i:] for i in range(0, len(kept) + 1, 2)]
            head = [Turn("system", system)] if system else []
            asked = [chat.prompt((*head, *end, Turn("user", question))) for end in ends]
            first = next(i for i, ids in enumerate(asked) if len(ids) <= context - 55)  # 220 / 4 < 60
            "".join(session.ask(question))
            assert told.prompts[-1] == asked[first]
            said = capfd.readouterr().err
            assert (f"are left out from here on ({first})" in said) == (first > 0)
            assert ("220 tokens, of which 55" in said) == (first > 0)
            n_cuts += first > 0
            made = answer.encode()[: min(longest, context - len(asked[first]))].decode(errors="replace")
            kept = [*ends[first], Turn("user", question), Turn("assistant", made)]
            assert session.turns == kept
    assert n_cuts > 8


def test_a_question_that_is_too_long_changes_nothing(tmp_path: Path, monkeypatch, capfd):
    told = Told(tmp_path, "Yes.", "No.", "z" * 50, context=70, longest=10)
    # 49 fit into the context of 70 with what the template writes, and leave the answer one token.
    lines = f"one\n{'x' * 50}\ntwo\n/system s\n{'x' * 49}\n/system\n/reset\n{'x' * 49}"
    code, out, err = talk(monkeypatch, capfd, told, lines)
    assert code == 2 and out == "Yes.\nNo.\nz\n"
    assert "error: the question is 70 tokens long, but the model's context is 70: shorten it to at" in err
    assert "error: the question, with what the system says, is 80 tokens long" in err
    assert told.asked()[1] == "[user\none][assistant\nYes.][user\ntwo][assistant\n"
    assert len(told.prompts[2]) == 69


def test_ctrl_c_keeps_what_was_said(tmp_path: Path, monkeypatch, capfd):
    """On a terminal; a second question follows. Before anything was said nothing is kept."""
    told = Told(tmp_path, b"ye", b"", "No.")
    theirs = terminal(monkeypatch, b"one\ntwo\nthree\n/exit\n")
    assert converse(told.session, "a model") == 0
    os.close(theirs)
    out, err = capfd.readouterr()
    assert err.count("the answer was ended by Ctrl-C; it is kept as it is") == 2 and "/help" in err
    assert "ye\n" in out and "No.\n" in out
    assert told.asked()[1:] == [
        f"[user\none][assistant\nye][user\n{question}][assistant\n" for question in ("two", "three")
    ]
    with pytest.raises(KeyboardInterrupt):  # of piped lines it ends the command
        talk(monkeypatch, capfd, Told(tmp_path, b"ye"), "one\ntwo\n")


def terminal(monkeypatch, typed: bytes) -> int:
    """A terminal as standard input, on which that has been typed."""
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, closefd=False))
    lines = iter(typed.decode().splitlines())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    return ours


def test_ctrl_c_at_the_prompt_is_130(tmp_path: Path, monkeypatch, capfd):
    told = Told(tmp_path)
    ours = terminal(monkeypatch, b"")

    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("core.errors.end_at_once", sys.exit)  # else pytest ends, too
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: converse(told.session, "a model"))
    os.close(ours)
    assert ended.value.code == 130 and capfd.readouterr().err.endswith("interrupted\n")


def test_templates_that_do_not_serve(tmp_path: Path):
    tokenizer = load_tokenizer("bytes")
    assert choose_template(None, None) is None
    with pytest.raises(UserError, match=r"a/b has no chat template.*port_torch\.finetune"):
        require_template(None, None, Path("a/b"))
    with pytest.raises(UserError, match=r"written with <\|im_start\|> and <\|im_end\|>, which the tokenizer"):
        open_template(tokenizer, require_template("own", "chatml", Path()))
    with pytest.raises(UserError, match=r"there is no template no\.jinja: give chatml, plain or"):
        require_template("own", "no.jinja", Path())
    plain = open_template(tokenizer, require_template("own", "plain", Path()))
    assert plain.stop == tokenizer.eos
    with pytest.raises(UserError, match="the model's own template ends an answer with no special token"):
        open_template(tokenizer, require_template("{{ messages[0]['content'] }}answer", None, Path()))
    for text, message in ((SILENT, "leaves out what the system says"), (GEMMA, "System role not supported")):
        answers = Answers(open_template(tokenizer, Template(text, (), "it")), 100, 10, lambda *_: iter(()))
        Session(answers, None)
        with pytest.raises(UserError, match=message):
            Session(answers, "Be brief.")
        session = Session(answers, None)
        with pytest.raises(UserError, match=message):
            obey(session, "/system Be brief.")
        assert session.system is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, 'must have a text "prompt" or turns in "messages"'),
        ({"prompt": "a", "messages": []}, 'must have a text "prompt" or turns'),
        ({"prompt": "a", "input": "b"}, "has the field 'input', for which a conversation has no place"),
        ({"prompt": ""}, "asks nothing"),
        ({"messages": []}, "asks nothing"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "asks not"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has roles out of order"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 1 of messages is of"),
        ({"prompt": "a", "system": 3}, "system must be a string"),
    ],
)
def test_rows_that_ask_nothing(row: dict, message: str):
    with pytest.raises(UserError, match=f"line 1.*{message}"):
        read_question(row, "line 1")


def test_a_file_of_questions(tmp_path: Path, capfd):
    """Rows are answered as they stand, the system before those that have none, cut like conversations."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    turns = [{"role": "user", "content": "a" * 50, "id": 1}, {"role": "assistant", "content": "b" * 50}] * 2
    path.write_text(
        '{"prompt": "one", "n": 1}\n{"messages": [{"role": "user", "content": "two"}], "system": "S"}\n'
        + f'{{"messages": {turns + turns[:1]}}}\n'.replace("'", '"')
    )
    told = Told(tmp_path, "1", "2", "3", context=280)
    files = BatchFile(batch_file=path, out=out)
    lines, questions = files.questions()
    assert "not used: messages.id" in capfd.readouterr().err
    settings = generation_settings(Sampling(), 8, load_tokenizer("bytes"), "abc")
    session = Session(told.answers, "T")
    assert answer_file(session, files, lines, questions, settings) == 0
    assert out.read_text().splitlines()[0] == '{"prompt": "one", "n": 1, "text": "1"}'
    asked = told.asked()
    assert asked[0] == "[system\nT][user\none][assistant\n"
    assert asked[1] == "[system\nS][user\ntwo][assistant\n"
    assert asked[2] == f"[system\nT][user\n{'a' * 50}][assistant\n{'b' * 50}][user\n{'a' * 50}][assistant\n"
    assert "1 of 3 conversations do not fit" in capfd.readouterr().err
    path.write_text(f'{{"prompt": "one"}}\n{{"prompt": "{"x" * 300}"}}\n')
    files = BatchFile(batch_file=path, out=tmp_path / "new")
    with pytest.raises(UserError, match=r"row 2 of .*rows.jsonl: the question, with what the system says,"):
        answer_file(session, files, *files.questions(), settings)
    assert sorted(file.name for file in tmp_path.glob("*")) == ["out.jsonl", "rows.jsonl"]


def test_typed_bytes_that_are_no_text_end_nothing(tmp_path: Path, monkeypatch, capfd):
    """Python gives them as lone surrogates, which no tokenizer encodes."""
    told = Told(tmp_path, "a")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("core.conversation.typed_lines", lambda: iter(["\udcff", "/system \udcff", "one"]))
    converse(told.session, "a model")
    out, err = capfd.readouterr()
    assert out == "a\n" and err.count("what was typed is not UTF-8") == 2
