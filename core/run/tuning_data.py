"""What a model is tuned on: the rows of a file as packed sequences, held-out ones, prompts, and the record.

Both engines make of the same rows, settings and model the same sequences in the same order.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from core.chat import ChatFormat, open_chat
from core.config import ModelConfig
from core.data.batches import record_at
from core.data.conversations import Conversation, Turn
from core.data.examples import example_of_conversation, examples_of
from core.data.row_packing import PADDING, pack
from core.data.sequences import HeldOut, Rows
from core.data.tuning_rows import CHAT, Row, RowFile, instruction
from core.errors import UserError
from core.run.folder import run_record
from core.run.tuning import TuningSource
from core.sampling import require_room
from core.tokenizer import Tokenizer, identity, tokenizer_record
from core.vocabulary import with_room

EPOCHS = 3.0
SAMPLES = 3
LONGEST_EXAMPLE = 200  # characters of a prompt that is shown as an example
VALID = "valid"


class Divided(NamedTuple):
    """The rows of a file as what is trained on and what is not."""

    train: Rows
    heldout: list[HeldOut]
    shown: list[Row | Conversation]
    """Held-out rows (training ones where none are held out), for samples."""
    n_long: int
    """Rows that do not fit into the context and are left out."""
    n_cut: int
    """Turns of conversations that do not fit, at their ends."""

    def left_out(self, file: RowFile) -> list[str]:
        """What of the file is not learned, in words."""
        counts = {
            "rows, which are longer than the context": self.n_long,
            "turns at the ends of conversations, which do not fit into the context": self.n_cut,
            "turns that nobody answers": file.unanswered,
        }
        return [f"{n:,} {what}" for what, n in counts.items() if n]


@dataclasses.dataclass(frozen=True)
class TuningData:
    """All of a run on rows but the model's weights."""

    divided: Divided
    form: str
    """Of the rows."""
    tokenizer: Tokenizer
    """With the tokens of the template."""
    model: ModelConfig
    """With rows in the embedding for them."""
    steps: int
    prompts: list[list[int]]
    """Ids to sample from."""
    fingerprint: str
    """Of all that the sequences depend on."""
    chat_template: str | None
    """How conversations are written, by these rows or by the model before; None: the model knows none."""
    table: list[tuple[str, str]]
    """What is printed of the rows, and of what is trained."""
    told: dict[str, str]
    """What the lineage says besides the base: `rows` (the file's name), their `form`, what was `trained`,
    `template`, and of prompts an `example`."""

    def record(self, config: TuningSource) -> dict[str, Any]:
        """What config.json and the manifests say of a run of these settings, as it is computed."""
        seen = {"fingerprint": self.fingerprint}
        record = run_record(config, self.model, self.steps, tokenizer_record(self.tokenizer), seen)
        return record if self.chat_template is None else record | {"chat_template": self.chat_template}


def make_tuning_data(
    config: TuningSource, file: RowFile, tokenizer: Tokenizer, own_template: str | None, model: ModelConfig
) -> TuningData:
    """The data of a run of these settings on the rows of a file.

    Args:
        tokenizer, own_template, model: those of what is tuned.

    Raises:
        UserError: no row is left to train on or to score, a prompt does not fit, or adapters are asked for
            that cannot learn what the rows need.
    """
    trained, chat, about = "all weights", None, []
    if config.lora.lora_rank is not None:
        trained = config.lora.describe(model)
    if file.form == CHAT:
        chat = open_chat(tokenizer, own_template, config.template, config.out)
        model, about = make_room(model, tokenizer, chat.tokenizer, config)
        about.append(("conversations", f"written by {chat.where}, an answer ends with {chat.stop_text}"))
        tokenizer = chat.tokenizer
    divided = divide(file, tokenizer, chat, model.context, config)
    train, n = divided.train, len(divided.train.tokens)
    steps = config.steps
    if steps is None:
        epochs = EPOCHS if config.epochs is None else config.epochs
        steps = max(1, round(epochs * n / config.batch))
    if config.batch > n:
        few = f"an update takes {config.batch} sequences of {n}, some more than once"
        about.append(("few rows", f"{few}: --batch {n} and a larger --epochs make more updates of them"))
    filled = train.documents != PADDING
    table = [
        ("started from", str(config.init_from)),
        ("trained", trained),
        ("data", f"{config.data}: {len(file.rows):,} rows of {file.form!r}, packed into {n:,} sequences, "
                 f"{filled.mean():.0%} filled"),
        ("left out", ", ".join(divided.left_out(file)) or "nothing"),
        *about,
        ("fields not used", ", ".join(f"{name} ({k:,} rows)" for name, k in file.unused.items()) or "-"),
        ("learned", f"{train.n_targets:,} of {filled.sum():,} tokens"),
    ]  # fmt: skip
    prompts = sample_prompts(config, file.form, divided.shown, tokenizer, chat, model.context)
    if not prompts:
        why = f"no row's prompt is at most {model.context // 2} tokens long, half of the context"
        table.append(("samples", f"none: {why} (--prompts gives others)"))
    template = own_template if chat is None else chat.template
    of_all = fingerprint(config, file, tokenizer, chat, model.context)
    told = {"rows": config.data.name, "form": file.form, "trained": trained}
    if chat is not None:
        told["template"] = Path(chat.where.removeprefix("the template ")).name
    elif file.form == "prompt" and len(divided.shown[0].prompt) <= LONGEST_EXAMPLE:
        told["example"] = divided.shown[0].prompt
    return TuningData(divided, file.form, tokenizer, model, steps, prompts, of_all, template, table, told)


def fingerprint(
    config: TuningSource, file: RowFile, tokenizer: Tokenizer, chat: ChatFormat | None, context: int
) -> str:
    """A hash of all that the sequences depend on."""
    contents = [file.sha256, *identity(tokenizer_record(tokenizer)), context, config.validation, config.seed]
    if file.has_context:  # runs from before it was read did not learn from the same rows
        contents.append("context")
    if chat is not None:
        contents.append(chat.template)
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def make_room(
    model: ModelConfig, old: Tokenizer, new: Tokenizer, config: TuningSource
) -> tuple[ModelConfig, list[tuple[str, str]]]:
    """The model with rows for the tokens that a template adds, and what the table says of that.

    Raises:
        UserError: adapters are trained, which leave the embedding as it is.
    """
    added = new.vocab_size - old.vocab_size
    if not added:
        return model, []
    if config.lora.lora_rank is not None:
        raise UserError(
            f"the template has {added} tokens that are new to the model, and adapters do not train the "
            "embedding: give --template plain, which needs none, or train all weights"
        )
    wider = with_room(model, new.vocab_size)
    grown = "" if wider == model else f" (from {model.vocab_size:,} rows to {wider.vocab_size:,})"
    what = f"{added} of the template, each begun as the mean of all others{grown}"
    return wider, [("new tokens", what)]


def divide(
    file: RowFile, tokenizer: Tokenizer, chat: ChatFormat | None, context: int, config: TuningSource
) -> Divided:
    """Holds out the share of the rows that is asked for, drawn by the seed, and packs both parts.

    Raises:
        UserError: no row is left to train on or to score.
    """
    n, n_long, n_cut = len(file.rows), 0, 0
    n_valid = max(1, round(config.validation * n)) if config.validation and n > 1 else 0
    drawn = {record_at(i, n, config.seed) for i in range(n_valid)}
    packed, n_bytes, shown = {}, 0, []
    for held in (False, True):
        examples, rows = [], [row for i, row in enumerate(file.rows) if (i in drawn) is held]
        for row in rows:
            if isinstance(row, Conversation):
                fitted = example_of_conversation(row, chat, context)
                of_row = [] if fitted.example is None else [fitted.example]
                n_cut += fitted.n_cut if of_row else 0
            else:
                of_row = examples_of(row, tokenizer, context)
            n_long += not of_row
            examples += of_row
            if of_row and held is bool(drawn):
                shown.append(row)
        if not rows and not held:
            raise UserError(
                f"--validation {config.validation:g} holds out all of the {n} rows of {config.data}: give a "
                "smaller share, or more rows"
            )
        if rows and not examples:
            raise UserError(
                f"no row of {config.data} to {'score' if held else 'train on'} fits the context of {context} "
                "tokens: give more rows, shorter ones, or another --validation"
            )
        packed[held] = pack(examples, context)
        n_bytes = sum(example.n_bytes for example in examples)
    heldout = []
    if drawn:
        scored = packed[True]
        heldout = [HeldOut(VALID, scored.n_targets, n_bytes, lambda limit: some(scored, limit))]
    return Divided(packed[False], heldout, shown, n_long, n_cut)


def some(rows: Rows, limit: int | None) -> Rows:
    """All rows, or `limit` of them spread evenly."""
    n = len(rows.tokens) if limit is None else min(limit, len(rows.tokens))
    return rows.part([i * len(rows.tokens) // n for i in range(n)])


def sample_prompts(
    config: TuningSource,
    form: str,
    shown: list[Row | Conversation],
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    context: int,
) -> list[list[int]]:
    """Ids to sample from: --prompts in the form of the rows, or the beginnings of rows."""
    if chat is not None:
        asked = [(Turn("user", text),) for text in config.prompts] or [row.question for row in shown]
        ids = [chat.prompt(turns) for turns in asked]
    else:
        texts = [instruction(text) if form == "instruction" else text for text in config.prompts]
        texts = texts or [row.prompt or " ".join(row.response.split()[:6]) for row in shown]
        ids = [tokenizer.begin(text) for text in texts]
    if config.prompts:
        require_room(ids, context)
        return ids
    return [prompt for prompt in ids if len(prompt) <= context // 2][:SAMPLES]
