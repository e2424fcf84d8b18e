"""What generating with JAX and with PyTorch share: how to draw, when a text ends, what is read and shown.

It imports neither, so that a command can check what it was given before they are imported.
"""

import dataclasses
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from core import checks
from core.errors import UserError
from core.help import Groups
from core.progress import Activity
from core.tokenizer import TextStream, Tokenizer

SMALLEST = 1e-6
"""Temperatures below it are 0: scores divided by less would overflow."""
GENERATION_OPTIONS: Groups = {
    "options": ("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed"),
    "a file of prompts": ("batch_file", "out", "batch"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0, and all below 1e-6, takes the likeliest token; 1 samples the model's own distribution."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Of the random draws: the same seed gives the same text."""

    def __post_init__(self) -> None:
        checks.not_negative(temperature=self.temperature)
        checks.counts(0, top_k=self.top_k)
        checks.above_zero_to_one(top_p=self.top_p)
        checks.seeds(seed=self.seed)
        # The same in numbers that float32 holds, so that it means the same in every implementation.
        # The likeliest of 262,144 tokens has more than 1e-6, so that a smaller top_p keeps it alone, too.
        object.__setattr__(self, "temperature", self.temperature if self.temperature >= SMALLEST else 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, SMALLEST))


def require_room(prompts: list[list[int]], context: int) -> None:
    """A UserError for a prompt that is empty or leaves no room in the context."""
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise UserError(f"{which} has no tokens; give at least one")
        if len(prompt) >= context:
            raise UserError(
                f"{which} is {len(prompt)} tokens long, but the model's context is {context}: shorten it to "
                f"at most {context - 1}"
            )


def until_ended(
    steps: Iterable[list[int]],
    prompts: list[list[int]],
    context: int,
    max_new_tokens: int,
    eos: int | Sequence[int] | None,
) -> Iterator[list[int | None]]:
    """The tokens of every step, None for a row that has ended; asks for no step that nobody needs.

    A row ends after `eos`, one of several perhaps (which it does not yield), after `max_new_tokens` or at the
    model's context.
    """
    room = np.array([context - len(prompt) for prompt in prompts])
    ended = np.zeros(len(prompts), bool)
    for made, new in enumerate(itertools.islice(steps, max_new_tokens), 1):
        if eos is not None:
            ended |= np.isin(new, eos)
        yield [None if done else token for done, token in zip(ended, new, strict=True)]
        ended |= made >= room
        if ended.all():
            return


def pieces(
    tokenizer: Tokenizer, prompts: list[list[int]], steps: Iterable[list[int | None]]
) -> Iterator[list[str]]:
    """The text that each step of `stream` adds to each row, in whole characters; at the end what is left.

    prompts: the ids before it; whether the first new token begins with a space depends on them.
    """
    streams = [TextStream(tokenizer) for _ in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        for token in prompt:
            stream.push(token)
    for tokens in steps:
        yield [
            "" if token is None else stream.push(token) for stream, token in zip(streams, tokens, strict=True)
        ]
    yield [stream.flush() for stream in streams]


def show(texts: list[str], added: Iterable[list[str]]) -> None:
    """Prints texts and what is added to them (`pieces`): one as it comes, several when all are done."""
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
        for (piece,) in added:
            print(piece, end="", flush=True)
        print()
    else:
        with Activity(f"sampling {len(texts)} texts"):
            columns = list(added)
        for text, *parts in zip(texts, *columns, strict=True):
            print(f"{text}{''.join(parts)}\n-----")


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, until Ctrl-D; Ctrl-C leaves them as a KeyboardInterrupt."""
    import readline  # noqa: F401 (so that input() lets lines be edited and recalled)

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: that is not UTF-8 ({error})", file=sys.stderr)
            continue
        yield line


def piped_prompt() -> str | None:
    """The text that is piped or redirected into the command, without a line feed at its end; None for none.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by what is no file
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    print("reading the prompt from stdin (or give one with --prompt)", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n") or None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt piped into the command is not UTF-8 ({error})") from None
