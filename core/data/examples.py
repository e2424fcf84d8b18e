"""Rows as tokens: what the model is given, and what it is to predict.

A row is `<s>` prompt response `</s>`; the response and its end are learned, of a text everything. With a
tokenizer that has no `<s>`, a text stands behind `</s>`, as documents do in pretraining, and a prompt behind
nothing. Prompt and response are encoded apart, so that their border is where it is when the model answers. A
conversation is written by its template (core/chat.py), and the assistant's turns are learned.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.data.conversations import Conversation
from core.data.tuning_rows import Row
from core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from core.chat import ChatFormat

IGNORE = -1
"""A target that is not to be predicted, and does not count."""


class Example(NamedTuple):
    """A row, or a piece of a long text, as what the model is given and what it is to predict."""

    tokens: np.ndarray
    """int32 [n]."""
    targets: np.ndarray
    """int32 [n]: the next id, -1 where it is not learned."""
    n_bytes: int
    """Length of what is learned, in UTF-8."""


class Fitted(NamedTuple):
    """A conversation's example."""

    example: Example | None
    """None: not even its first answer fits."""
    n_cut: int
    """Turns at its end that do not fit into the context."""


def example_of_conversation(conversation: Conversation, chat: "ChatFormat", context: int) -> Fitted:
    """The conversation up to the last answer that fits into the context."""
    turns = conversation.turns
    for end in range(len(turns), 0, -1):
        kept = turns[:end]
        if not kept[-1].learned:
            continue
        ids, learned = chat.encode(Conversation(kept))
        if len(ids) - 1 <= context:
            n_bytes = sum(len(turn.content.encode()) for turn in kept if turn.learned)
            example = Example(ids[:-1], np.where(learned, ids, IGNORE)[1:], n_bytes)
            return Fitted(example, len(turns) - end)
    return Fitted(None, len(turns))


def examples_of(row: Row, tokenizer: Tokenizer, context: int) -> list[Example]:
    """The row's examples: one; for a long text several, each of at most `context` places; none where a prompt
    with its response is longer, since cutting it would teach answers without an end."""
    prompt = tokenizer.begin(row.prompt)
    response = [*map(int, tokenizer.encode(row.response)), tokenizer.eos]
    ids = np.array(prompt + response, np.int32)
    n_bytes = len(row.response.encode())
    tokens, targets = ids[:-1], ids[1:].copy()
    targets[: len(prompt) - 1] = IGNORE
    if len(tokens) <= context:
        return [Example(tokens, targets, n_bytes)]
    if row.prompt:
        return []
    cuts = range(0, len(tokens), context)
    pieces = [(tokens[i : i + context], targets[i : i + context]) for i in cuts]
    # The bytes of a piece are not known apart; only their sum over all pieces is used.
    return [Example(*piece, n_bytes if i == 0 else 0) for i, piece in enumerate(pieces)]
