"""Conversations as tokens: by a Jinja template, as transformers, vLLM and llama.cpp render it.

A template turns messages into one text, whose special tokens (`<|im_start|>`) become ids of their own. The
tokens to learn are those of the assistant's turns, each up to the token that ends it. Where they lie is found
by rendering the conversation up to there: what the template writes for the turns before an answer must be how
it begins the whole, so that the model meets at its answer what it was given in training.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from core.data.conversations import Conversation, Turn
from core.errors import UserError
from core.file_tokenizer import FileTokenizer
from core.tokenizer import TOKENIZER_FILE, Tokenizer
from core.tokenizer_json import as_library, special_tokens, with_tokens

CHATML = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("\n", "\\n")
"""ChatML, for a model that has no template of its own: two tokens of its own begin and end every turn."""
PLAIN = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{% else %}"
    "{{ '### Assistant:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
).replace("\n", "\\n")
"""Speakers in plain text and answers that end as documents do, for a model that is to get no new tokens."""
TEMPLATES = {"chatml": (CHATML, ("<|im_start|>", "<|im_end|>")), "plain": (PLAIN, ())}
"""Name -> template, and the special tokens that it is written with."""
NO_MARKS = MappingProxyType({"bos_token": "", "eos_token": ""})
PLACEHOLDER = "\ue000{}\ue001"  # for what is said, by its turn's number: characters of private use
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
PROBE = (Turn("user", "question"), Turn("assistant", "answer", learned=True))


class Template(NamedTuple):
    """A template that was chosen."""

    text: str
    tokens: tuple[str, ...]
    """Special tokens that it must have."""
    where: str
    """What it is called in messages."""


def choose_template(own: str | None, given: str | None) -> Template | None:
    """The template that the user names, else the model's own; None where there is neither.

    Args:
        own: the template that the model comes with.
        given: one of `TEMPLATES`, or the path of a file.

    Raises:
        UserError: the file cannot be read.
    """
    if given in TEMPLATES:
        return Template(*TEMPLATES[given], f"the template {given}")
    if given is not None:
        return Template(read_text_file(Path(given)), (), f"the template {given}")
    return None if own is None else Template(own, (), "the model's own template")


def require_usable(template: Template, marks: Mapping[str, str] = NO_MARKS) -> None:
    """Refuses what is no template, fails at the simplest conversation, or leaves out what is said.

    marks: the tokens that it may name.
    """
    shown = render(template.text, template.where, PROBE, asks=False, marks=marks)
    if missing := [turn.role for turn in PROBE if turn.content not in shown]:
        raise UserError(f"{template.where} leaves out what the {missing[0]} says: choose another template")


def require_template(own: str | None, given: str | None, model: Path) -> Template:
    """What `choose_template` gives for a model that is to converse as it is; a UserError for nothing."""
    template = choose_template(own, given)
    if template is None:
        raise UserError(
            f"{model} has no chat template, so it has not learned to converse: tune it on conversations with "
            "`python -m train_tpu.finetune` or `python -m port_torch.finetune`, or name how they are written "
            "with --template"
        )
    return template


def open_template(tokenizer: Tokenizer, template: Template) -> "ChatFormat":
    """A model's tokenizer, as it is, with a template; a UserError where it lacks a token of that."""
    special = special_tokens(as_library(tokenizer))
    if missing := [token for token in template.tokens if token not in special]:
        raise UserError(
            f"{template.where} is written with {' and '.join(missing)}, which the tokenizer "
            f"{tokenizer.name} lacks: give another --template (plain needs none), or tune the model on "
            "conversations"
        )
    return ChatFormat(tokenizer, template.text, template.where)


def open_chat(tokenizer: Tokenizer, own: str | None, given: str | None, folder: Path) -> "ChatFormat":
    """The template that a model is tuned with: the one that the user names, its own, or ChatML.

    Args:
        tokenizer: the model's. That of the result may have more tokens, and has the one that ends an
            answer as its `eos`, at which generation stops.
        own, given: as in `choose_template`.
        folder: where the tokenizer is going to be carried.

    Raises:
        UserError: the template cannot be read, or is not fit to learn from (`ChatFormat`).
    """
    chosen = choose_template(own, given) or choose_template(None, "chatml")
    template, tokens, where = chosen
    tokenizer = with_tokens(tokenizer, tokens, folder / TOKENIZER_FILE)
    chat = ChatFormat(tokenizer, template, where)
    if chat.stop == tokenizer.eos:
        return chat
    library = as_library(tokenizer)
    bos = None if tokenizer.bos is None else library.id_to_token(tokenizer.bos)
    named = {"bos": bos, "eos": library.id_to_token(chat.stop)}
    content = tokenizer.content or library.to_str(pretty=True).encode()
    return ChatFormat(FileTokenizer(folder / TOKENIZER_FILE, named, content), template, where)


def folder_template(folder: Path) -> str | None:
    """The template in a folder of weights: chat_template.jinja, or what tokenizer_config.json has.

    Raises:
        UserError: a file is damaged.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text_file(file)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_bytes()).get("chat_template")
        if isinstance(template, list):  # several by name, as transformers 4 had them
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): copy it again from where it came") from None
    if not isinstance(template, str | None):
        raise UserError(f"{file} has a chat_template that is no text: copy it again from where it came")
    return template


def read_text_file(file: Path) -> str:
    """The text of a template's file."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text, so it is no template") from None
    except FileNotFoundError:
        known = ", ".join(TEMPLATES)
        raise UserError(f"there is no template {file}: give {known} or the path of a Jinja file") from None


class ChatTokens(NamedTuple):
    """A conversation as tokens."""

    ids: np.ndarray
    """int32 [n]."""
    learned: np.ndarray
    """bool [n]: the assistant's."""


class ChatFormat:
    """A tokenizer with the template that it writes conversations by."""

    def __init__(self, tokenizer: Tokenizer, template: str, where: str) -> None:
        """where: what the template is called in errors.

        Raises:
            UserError: the template cannot be rendered, leaves out what is said, writes an answer otherwise
                once turns follow it, or ends it with no special token.
        """
        self.tokenizer, self.template, self.where = tokenizer, template, where
        self._library = as_library(tokenizer)
        self._special = special_tokens(self._library)
        self._spelled = re.compile(
            "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)"
        )
        marks = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        self._marks = {
            name: self._library.id_to_token(mark) for name, mark in marks.items() if mark is not None
        }
        require_usable(Template(template, (), where), self._marks)
        ids, learned = self.encode(Conversation(PROBE))
        if not learned.any() or ids[learned][-1] not in self._special.values():
            raise UserError(
                f"{where} ends an answer with no special token of the tokenizer {tokenizer.name}, so the "
                "model would not learn to stop: choose another template"
            )
        self.stop = int(ids[learned][-1])
        """The id that ends an answer."""
        self.stop_text = self._library.id_to_token(self.stop)

    def encode(self, conversation: Conversation) -> ChatTokens:
        """The whole conversation, and which of its tokens are the assistant's."""
        turns = conversation.turns
        text = self._render(turns, asks=False)
        spans = [self._span(turns, place, text) for place, turn in enumerate(turns) if turn.learned]
        ids, starts, ends = self._encode(text, turns, asks=False)
        learned = np.zeros(len(ids), bool)
        for start, end in spans:
            learned |= (ends > start) & (starts < end)
        return ChatTokens(ids, learned)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """What the model is given to answer the last of these turns, which is the user's."""
        return self._encode(self._render(turns, asks=True), turns, asks=True)[0].tolist()

    def _span(self, turns: Sequence[Turn], place: int, text: str) -> tuple[int, int]:
        """Where in the text a turn of the assistant lies, up to the end of its last special token."""
        before, through = self._render(turns[:place], asks=True), self._render(turns[: place + 1], asks=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise UserError(
                f"{self.where} writes an answer otherwise once turns follow it, or begins it otherwise when "
                "the model is asked, so what is to be learned cannot be told: choose another template"
            )
        last = [found.end() for found in self._spelled.finditer(through, len(before))]
        return len(before), last[-1] if last else len(through)

    def _render(self, turns: Sequence[Turn], asks: bool) -> str:
        """The text of these turns; asks: with what opens the assistant's answer."""
        return render(self.template, self.where, turns, asks, self._marks)

    def _encode(
        self, text: str, turns: Sequence[Turn], asks: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text that `_render` made, and where in it each begins and ends.

        A special token that a speaker spells is text: it is encoded apart, as what it is written with.
        """
        pieces, done = [], 0
        for start, end in self._spelled_by_speakers(text, turns, asks):
            pieces += [(done, text[done:start], False), (start, text[start:end], True)]
            done = end
        pieces.append((done, text[done:], False))
        ids, starts, ends = [], [], []
        for begin, piece, literal in pieces:
            self._library.encode_special_tokens = literal
            encoding = self._library.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            starts += [begin + start for start, _ in encoding.offsets]
            ends += [begin + end for _, end in encoding.offsets]
        return np.array(ids, np.int32), np.array(starts, np.int64), np.array(ends, np.int64)

    def _spelled_by_speakers(self, text: str, turns: Sequence[Turn], asks: bool) -> list[tuple[int, int]]:
        """Where the text has special tokens that come from what is said, and not from the template.

        Searching for what is said would not tell: a user may say just what the template begins a turn with.
        So the template is rendered once more, with a placeholder for every content.
        """
        if not any(self._spelled.search(turn.content) for turn in turns):
            return []
        named = [turn._replace(content=PLACEHOLDER.format(place)) for place, turn in enumerate(turns)]
        first, *rest = PLACEHOLDERS.split(self._render(named, asks))
        said = [turns[int(place)].content for place in rest[::2]]
        found = find_contents(text, first, said, rest[1::2])
        if found is None:
            spells = next(turn.content for turn in turns if self._spelled.search(turn.content))
            raise UserError(
                f"{self.where} changes what is said, and a turn spells one of its special tokens: "
                f"remove it from {spells[:40]!r}"
            )
        places = []
        for content, begin in zip(said, found, strict=True):
            spelled = self._spelled.finditer(content)
            places += [(begin + token.start(), begin + token.end()) for token in spelled]
        return places


def find_contents(text: str, first: str, said: Sequence[str], after: Sequence[str]) -> list[int] | None:
    """Where in a text each content begins, or would, were it not stripped; None where they do not make it up.

    Args:
        first: what the template writes before the first of them.
        said: the contents in the order of the text, which has each as it is, or stripped on any side.
        after: what the template writes behind each of them.
    """
    # The places up to which the contents so far may reach, each with the one before and the content's begin:
    # few, where the ways to them double with every content that could be stripped or not.
    places, steps = [len(first)] if text.startswith(first) else [], []
    for content, behind in zip(said, after, strict=True):
        step: dict[int, tuple[int, int]] = {}
        for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
            for place in places:
                if text.startswith(form + behind, place):
                    step.setdefault(place + len(form + behind), (place, place - content.find(form)))
        steps.append(step)
        places = list(step)
    if len(text) not in places:
        return None
    found, place = [], len(text)
    for step in reversed(steps):
        place, begin = step[place]
        found.append(begin)
    return found[::-1]


def render(template: str, where: str, turns: Sequence[Turn], asks: bool, marks: Mapping[str, str]) -> str:
    """The text that a template makes of turns; asks: with what opens the assistant's answer.

    Raises:
        UserError: it is no template, or fails at them.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    made = _compiled(template, where)
    try:
        return made.render(messages=messages, add_generation_prompt=asks, **marks)
    except Exception as error:  # a template is a program, and may raise anything
        said = ", ".join(turn.role for turn in turns)
        raise UserError(f"{where} fails at the turns {said}: {error}") from error


@functools.lru_cache(8)
def _compiled(template: str, where: str) -> Any:
    """The template, ready to render; as transformers compiles it, so that it means the same."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks an answer for transformers: its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"{where} is no Jinja template: {error}") from error
