"""What every way to generate shares: which prompts can be gone on from, and where rows end."""

from collections.abc import Iterable, Iterator

import numpy as np

from core.errors import UserError


def require_room(prompts: list[list[int]], context: int) -> None:
    """A UserError for a prompt that is empty or leaves no room in the context."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1:
        raise UserError("a prompt has no tokens; give at least the begin-of-sequence token")
    if longest >= context:
        raise UserError(
            f"a prompt is {longest} tokens long, but the model's context is {context}: shorten it to at most "
            f"{context - 1}"
        )


def until_ended(
    steps: Iterable[list[int]], prompts: list[list[int]], context: int, max_new_tokens: int, eos: int | None
) -> Iterator[list[int | None]]:
    """The tokens of every step, None for a row that has ended; asks for no step that nobody needs.

    A row ends after `eos` (which it does not yield), `max_new_tokens` or at the model's context.
    """
    room = np.array([context - len(prompt) for prompt in prompts])
    ended = np.zeros(len(prompts), bool)
    for made, new in enumerate(steps, 1):
        if eos is not None:
            ended |= np.array(new) == eos
        yield [None if done else token for done, token in zip(ended, new, strict=True)]
        ended |= made >= room
        if ended.all() or made == max_new_tokens:
            return
