"""A conversation with a model: turns typed or piped in, commands between them, answers as they are made.

Both engines serve it: each gives an `Answers`, which makes tokens of ids. What was said is kept as text and
written anew by the template for every answer, and the model reads it again: its cache of keys and values is
not kept, since a template may write earlier turns otherwise once others follow. Reading a whole context takes
about as long as writing a few dozen tokens.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from core.batch_file import BatchFile, write_texts
from core.chat import ChatFormat
from core.data.conversations import Turn
from core.errors import UserError
from core.sampling import pieces, typed_lines

SHARE = 4
"""An answer is left this part of the context, or --max-new-tokens where they are fewer; 4: a quarter."""
HELP = """\
/reset         begin a new conversation; what the system says stays
/system TEXT   what the system says from now on; without TEXT, nothing
/help          this list
/exit          end, as does the end of the input (Ctrl-D)
A line that begins with a blank is a question even if a slash follows. Ctrl-C ends an answer."""


@dataclasses.dataclass(frozen=True)
class ConversationOptions:
    """How to converse."""

    system: str | None = None
    """What the system says before a conversation begins, and before every row of --batch-file that does not
    say it itself."""
    template: str | None = None
    """How conversations are written: chatml, plain or the path of a Jinja file. The tokenizer must have the
    tokens that it is written with. Default: the model's own template."""


class Fitted(NamedTuple):
    """What a model is given to answer."""

    ids: list[int]
    n_left_out: int
    """Exchanges, the oldest ones, for which there was no room."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model that answers."""

    chat: ChatFormat
    context: int
    """In tokens."""
    max_new_tokens: int
    stream: Callable[[list[list[int]], int, Sequence[int]], Iterator[list[int | None]]]
    """(prompts, the number of the first, the ids that end an answer) -> the next token of every prompt, step
    by step; None for one that has ended. A prompt's random numbers depend on its number."""

    @property
    def ends(self) -> list[int]:
        """The ids that end an answer: the template's, and that of the end of a document."""
        return sorted({self.chat.stop, self.chat.tokenizer.eos})

    @property
    def room(self) -> int:
        """Tokens that are left for an answer while there are exchanges to leave out."""
        return max(1, min(self.max_new_tokens, self.context // SHARE))

    def fit(self, turns: Sequence[Turn]) -> Fitted:
        """The turns up to a question, as ids; the oldest exchanges are left out where there is no room.

        The turn of the system stays. A question that leaves less room than an answer is to have is asked
        alone.

        Raises:
            UserError: not even the question fits.
        """
        n_system = int(turns[0].role == "system")
        system, spoken = turns[:n_system], turns[n_system:]
        for start in range(0, len(spoken), 2):
            ids = self.chat.prompt((*system, *spoken[start:]))
            alone = start + 1 == len(spoken)
            if len(ids) <= self.context - (1 if alone else self.room):
                return Fitted(ids, start // 2)
        what = "the question, with what the system says," if system else "the question"
        raise UserError(
            f"{what} is {len(ids)} tokens long, but the model's context is {self.context}: shorten it to at "
            f"most {self.context - 1}"
        )

    def require_system(self, text: str) -> None:
        """A UserError where the template has no place for what the system says."""
        question = Turn("user", "question")
        if self.chat.prompt((Turn("system", text), question)) == self.chat.prompt((question,)):
            raise UserError(f"{self.chat.where} leaves out what the system says: say it in the question")


class Session:
    """The turns so far, and how the next is answered."""

    def __init__(self, answers: Answers, system: str | None) -> None:
        """system: what it says. A UserError where the template has no place for it."""
        self.answers = answers
        self.turns: list[Turn] = []
        """Of the user and the assistant, but for those that were left out."""
        self.ended_by: str | None = None
        """What cut the last answer off; None: it came to its end."""
        self._number = 0
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """What the system says from now on, None for nothing; a UserError as in `__init__`."""
        if text is not None:
            self.answers.require_system(text)
        self.system = text

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece in whole characters.

        Both turns are kept; of an answer that is not read to its end, what was made of it, and neither turn
        if that is nothing.

        Raises:
            UserError: the question does not fit into the context, and the conversation is as before.
        """
        answers, turn = self.answers, Turn("user", question)
        system = [] if self.system is None else [Turn("system", self.system)]
        fitted = answers.fit([*system, *self.turns, turn])
        if fitted.n_left_out:
            del self.turns[: 2 * fitted.n_left_out]
            say(
                f"the conversation no longer fits into the context of {answers.context} tokens, of which "
                f"{answers.room} are left for the answer: the oldest exchanges are left out from here on "
                f"({fitted.n_left_out})"
            )
        said, made, ended = [], [], False

        def steps() -> Iterator[list[int | None]]:
            for step in answers.stream([fitted.ids], self._number, answers.ends):
                made.append(step[0])
                yield step

        try:
            for (piece,) in pieces(answers.chat.tokenizer, [fitted.ids], steps()):
                said.append(piece)
                yield piece
            ended = True
        finally:
            self._number += 1
            if ended or any(said):
                self.turns += [turn, Turn("assistant", "".join(said))]
        self.ended_by = None
        if made[-1] is not None:
            cut = "--max-new-tokens" if len(made) == answers.max_new_tokens else "the context"
            self.ended_by = f"{cut}, after {len(made)} tokens"


def converse(session: Session, about: str) -> int:
    """Answers one line after the other, typed or piped in, until /exit or the end; returns the exit code.

    On a terminal, Ctrl-C ends an answer. What is no answer goes to stderr. Of piped lines the code is 2 if
    one could not be answered.

    about: what is said first: which model, and what computes it.
    """
    typed = sys.stdin is not None and sys.stdin.isatty()
    say(f"{about}{'; /help lists the commands' if typed else ''}")
    code = 0
    for line in typed_lines() if typed else _piped_lines():
        try:
            # Bytes that Python could not read stand in a line as surrogates.
            if any("\ud800" <= character <= "\udfff" for character in line):
                raise UserError("what was typed is not UTF-8: set the terminal to it, or type it again")
            if line.startswith("/"):
                if not obey(session, line.strip()):
                    break
            elif line.strip():
                _print_answer(session, line.strip(), typed)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return 0 if typed else code


def obey(session: Session, line: str) -> bool:
    """Does what a command says; returns whether the conversation continues.

    Raises:
        UserError: there is no such command.
    """
    name, *rest = line.split(maxsplit=1)
    if name == "/system":
        session.set_system(rest[0] if rest else None)
        say("the system says this from now on" if rest else "the system says nothing from now on")
    elif rest or name not in ("/reset", "/help", "/exit"):
        raise UserError(
            f"there is no command {line!r}: /help lists them; put a blank before a question that begins with "
            "a slash"
        )
    elif name == "/reset":
        session.turns.clear()
        say("a new conversation")
    elif name == "/help":
        print(HELP, file=sys.stderr)
    return name != "/exit"


def _print_answer(session: Session, question: str, typed: bool) -> None:
    """Prints the answer as it comes, and says what cut it off."""
    session.ended_by = None
    with contextlib.closing(session.ask(question)) as answer:
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not typed:
                raise
            session.ended_by = "Ctrl-C"
    print(flush=True)
    if session.ended_by is not None:
        say(f"the answer was ended by {session.ended_by}; it is kept as it is")


def _piped_lines() -> Iterator[str]:
    """Lines from what is piped or redirected into the command; none if that is closed.

    Raises:
        UserError: a line is not UTF-8.
    """
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8 ({error}): convert it") from None


def answer_file(
    session: Session,
    files: BatchFile,
    lines: list[dict[str, Any]],
    questions: list[tuple[Turn, ...]],
    settings: dict[str, Any],
) -> int:
    """Answers every row of a batch file; returns the exit code of `write_texts`.

    Args:
        session: a new one; its system speaks in the rows that do not say what it says.
        lines: the rows, and questions: the turns in each, the last of them the user's.
        settings: what the answers depend on besides.

    Raises:
        UserError: a question does not fit, before any is answered.
    """
    answers, system = session.answers, session.system
    prompts, n_cut = [], 0
    for number, turns in enumerate(questions, 1):
        if system is not None and turns[0].role != "system":
            turns = (Turn("system", system), *turns)
        try:
            fitted = answers.fit(turns)
        except UserError as error:
            raise UserError(f"row {number} of {files.batch_file}: {error}") from None
        prompts.append(fitted.ids)
        n_cut += fitted.n_left_out > 0
    if n_cut:
        say(
            f"{n_cut:,} of {len(lines):,} conversations do not fit into the context of {answers.context} "
            f"tokens, of which {answers.room} are left for the answer: their oldest exchanges are left out"
        )

    def added(prompts: list[list[int]], first_row: int) -> Iterator[list[str]]:
        return pieces(answers.chat.tokenizer, prompts, answers.stream(prompts, first_row, answers.ends))

    template = hashlib.sha256(answers.chat.template.encode()).hexdigest()
    settings = settings | {"system": system, "template": template}
    return write_texts(files.out, lines, prompts, files.batch, settings, added)


def say(text: str) -> None:
    """Tells the user something that is no answer."""
    print(f"({text})", file=sys.stderr, flush=True)
