"""Conversations in the rows of a JSONL file: turns of a system, a user and an assistant.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}      ShareGPT's
    {"prompt": [turns], "completion": [turns]}                         of which the completion is learned

An optional turn of the system comes first, or is the row's field `system`; then user and assistant take
turns, the user first. The assistant's turns are learned, but for one with `"weight": 0`, as OpenAI has it.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.errors import UserError

CHATS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What a row calls the speakers -> what a template calls them."""
SPEAKER, SAID = ("role", "from"), ("content", "value")
READ = {*SPEAKER, *SAID, "weight"}
NO_PLACE = ("input", "context", "history", "tools", "functions")
"""Fields that an answer may depend on and that no turn holds."""


def filled(value: Any) -> bool:
    """Whether a field holds anything; 0 and false do."""
    return value not in (None, "", [], {})


class Turn(NamedTuple):
    """What one of the speakers says."""

    role: str
    """system, user or assistant."""
    content: str
    learned: bool = False


class Conversation(NamedTuple):
    """Turns, the last of them the assistant's."""

    turns: tuple[Turn, ...]

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the first answer."""
        return self.turns[: [turn.role for turn in self.turns].index("assistant")]


class Read(NamedTuple):
    """A conversation as it was in a row."""

    conversation: Conversation
    unused: set[str]
    """What its turns have beyond speaker and content: fields that are not used."""
    unanswered: bool
    """Whether it ended with a turn of the user, which is left out."""


class Question(NamedTuple):
    """Turns to be answered as they were in a row, the last of them the user's."""

    turns: tuple[Turn, ...]
    unused: set[str]
    """As in `Read`."""


def read_conversation(fields: Mapping[str, Any], used: tuple[str, ...], where: str) -> Read:
    """The conversation in the fields `used` of a row: turns, or prompt and completion; then perhaps system.

    Raises:
        UserError: it has no turn of the assistant, roles out of order, or a turn that is not text.
    """
    turns, unused = _turns(fields, used, where)
    unanswered = bool(turns) and turns[-1].role == "user"
    turns = turns[:-1] if unanswered else turns
    if not any(turn.learned for turn in turns):
        raise UserError(f"{where} has no turn of the assistant to learn: give one, or remove the row")
    return Read(Conversation(tuple(turns)), unused, unanswered)


def read_question(fields: Mapping[str, Any], where: str) -> Question:
    """The turns of a row {"prompt"} or {"messages"}, perhaps with a field `system`.

    Raises:
        UserError: it has neither or both, or a field that an answer may depend on and that has no place;
            roles are out of order, the user's is not the last, or a turn is not text.
    """
    held = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(held) != 1:
        raise UserError(f'{where} must have a text "prompt" or turns in "messages": give one of them')
    if others := [name for name in NO_PLACE if fields.get(name)]:
        raise UserError(
            f"{where} has the field {others[0]!r}, for which a conversation has no place: remove it from "
            "every row"
        )
    if isinstance(fields[held[0]], str):
        fields = {**fields, held[0]: [{"role": "user", "content": fields[held[0]]}]}
    used = (*held, *(["system"] if fields.get("system") is not None else []))
    turns, unused = _turns(fields, used, where)
    if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
        raise UserError(f"{where} asks nothing: its last turn must be the user's, and not empty")
    return Question(tuple(turns), unused)


def _turns(fields: Mapping[str, Any], used: tuple[str, ...], where: str) -> tuple[list[Turn], set[str]]:
    """The turns in the lists of a row and in its field `system`, in order; and what else they have."""
    turns, unused = [], set()
    for name in used:
        if name == "system":
            continue
        if not isinstance(fields[name], list):
            raise UserError(f"{where}: {name} must be a list of turns, got {json.dumps(fields[name])[:40]}")
        for number, turn in enumerate(fields[name], 1):
            turns.append(_turn(turn, f"{where}: turn {number} of {name}", learns=name != "prompt"))
            unused |= {f"{name}.{key}" for key in turn if key not in READ and filled(turn[key])}
    if "system" in used:
        if not isinstance(fields["system"], str):
            raise UserError(f"{where}: system must be a string, got {json.dumps(fields['system'])[:40]}")
        if turns and turns[0].role == "system":
            raise UserError(f"{where} has a turn of the system and the field 'system': give one of them")
        turns.insert(0, Turn("system", fields["system"]))
    _require_order(turns, where)
    return turns, unused


def _turn(turn: Any, where: str, learns: bool) -> Turn:
    """One turn of a row, checked."""
    if not isinstance(turn, dict):
        raise UserError(f'{where} must be an object {{"role", "content"}}, got {json.dumps(turn)[:40]}')
    for names, what in ((SPEAKER, "who speaks"), (SAID, "what is said")):
        if sum(name in turn for name in names) != 1:
            raise UserError(f"{where} must say {what} in {names[0]!r} (or in {names[1]!r}): give one of them")
    speaker, content = (next(turn[name] for name in names if name in turn) for names in (SPEAKER, SAID))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UserError(
            f"{where} is of {json.dumps(speaker)[:40]}, and the roles are {', '.join(ROLES)}: rewrite it"
        )
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            raise UserError(f"{where} calls a tool ({name}), which is not supported: rewrite or remove it")
    content = _text_of(content, where)
    role = ROLES[speaker]
    if role == "assistant" and not content.strip():
        raise UserError(f"{where} has nothing to learn: what the assistant says is empty")
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where} has the weight {json.dumps(weight)[:40]}: give 1 (learned) or 0")
    return Turn(role, content, learns and role == "assistant" and weight != 0)


def _text_of(content: Any, where: str) -> str:
    """A turn's content: a text, or OpenAI's list of parts, all of them text."""
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise UserError(f"{where} has a part that is no text: {json.dumps(part)[:60]}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: what is said must be a string, got {json.dumps(content)[:40]}")
    return content


def _require_order(turns: list[Turn], where: str) -> None:
    """A UserError unless user and assistant take turns, the user first, behind at most one of the system."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    for number, role in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = number + 1 + len(roles) - len(spoken)
            raise UserError(
                f"{where} has roles out of order: its turn {place} is of {role!r}, where {expected!r} comes "
                "next (system first, if at all; then user and assistant by turns)"
            )
