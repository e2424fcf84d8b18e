"""Fine-tuning on the rows of a file: from what the command was given to the `Job` that is trained."""

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

import torch

from core.chat import ChatFormat, open_chat
from core.data.batches import record_at
from core.data.conversations import Conversation, Turn
from core.data.examples import IGNORE, example_of_conversation, examples_of
from core.data.tuning_rows import CHAT, Row, RowFile, instruction
from core.errors import UserError
from core.run.folder import run_record
from core.sampling import require_room
from core.tokenizer import Tokenizer, identity, tokenizer_record
from core.vocabulary import vocabulary_leaves, with_room, with_rows
from port_torch.model import Decoder, decoder_of
from port_torch.training.batches import HeldOut, Rows, empty_rows
from port_torch.training.distributed import Distributed, open_distributed
from port_torch.training.lora import add_adapters
from port_torch.training.packing import PADDING, pack, packed_batches
from port_torch.training.pretrained import open_pretrained
from port_torch.training.setup import Job, begin, require_deterministic_operations
from port_torch.training.trainer import train
from port_torch.training.tuned import tuning

if TYPE_CHECKING:
    from port_torch.finetune import FinetuneConfig

EPOCHS = 3.0
SAMPLES = 3
VALID = "valid"


def run(config: "FinetuneConfig", file: RowFile) -> int:
    """Trains on the rows of a file; returns the exit code of `core.run.interrupt`."""
    if config.deterministic:
        require_deterministic_operations()
    with open_distributed(config.device) as ranks:
        return train(make_job(config, file, ranks), ranks)


def make_job(config: "FinetuneConfig", file: RowFile, ranks: Distributed) -> Job:
    """Model and data of a run."""
    config = begin(config, config.out, ranks)
    pretrained = open_pretrained(config.init_from, "finetune", config.tokenizer)
    decoder, tokenizer, chat, about = pretrained.decoder, pretrained.tokenizer, None, []
    if file.form == CHAT:
        chat = open_chat(tokenizer, pretrained.chat_template, config.template, config.out)
        decoder, about = make_room(decoder, tokenizer, chat.tokenizer, config)
        about.append(("conversations", f"written by {chat.where}, an answer ends with {chat.stop_text}"))
        tokenizer = chat.tokenizer
    model, mine = decoder.config, ranks.rows(config.batch)
    divided = divide(file, tokenizer, chat, model.context, config)
    trained = "all weights"
    if config.lora.lora_rank is not None:
        trained = add_adapters(decoder, config.lora, config.seed)
    n = len(divided.train.tokens)
    steps = config.steps
    if steps is None:
        epochs = EPOCHS if config.epochs is None else config.epochs
        steps = max(1, round(epochs * n / config.batch))
    record = tokenizer_record(tokenizer)
    contents = [file.sha256, *identity(record), model.context, config.validation, config.seed]
    if file.has_context:  # runs from before it was read did not learn from the same rows
        contents.append("context")
    if chat is not None:
        contents.append(chat.template)
    fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    filled = float((divided.train.documents != PADDING).mean())
    run = run_record(config, model, steps, record, {"fingerprint": fingerprint})
    if chat is not None:
        run["chat_template"] = chat.template
    return Job(
        config=config,
        out=config.out,
        defaults=type(config)(init_from=config.init_from, data=config.data, out=config.out),
        decoder=decoder.to(ranks.device),
        tokenizer=tokenizer,
        record=run,
        lineage=pretrained.lineage,
        steps=steps,
        batches=lambda start: packed_batches(
            divided.train, seed=config.seed, batch=config.batch, start=start, rows=mine
        ),
        example=lambda n: empty_rows(n, model.context, packed=True),
        heldout=divided.heldout,
        prompts=sample_prompts(config, file.form, divided.shown, tokenizer, chat, model.context),
        table=[
            ("started from", str(config.init_from)),
            ("trained", trained),
            ("data", f"{config.data}: {len(file.rows):,} rows of {file.form!r}, packed into {n:,} sequences, "
                     f"{filled:.0%} filled"),
            ("left out", ", ".join(divided.left_out(file)) or "nothing"),
            *about,
            ("fields not used", ", ".join(f"{name} ({k:,} rows)" for name, k in file.unused.items()) or "-"),
        ],
        tuning=tuning(file.form, divided.shown[0]),
        lora=None if config.lora.lora_rank is None else config.lora,
    )  # fmt: skip


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


def divide(
    file: RowFile, tokenizer: Tokenizer, chat: ChatFormat | None, context: int, config: "FinetuneConfig"
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
        examples = []
        for number, row in enumerate(file.rows):
            if (number in drawn) is not held:
                continue
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
        if not examples and (drawn or not held):
            raise UserError(
                f"none of the {n} rows of {config.data} that fit the context of {context} tokens is left to "
                f"{'score' if held else 'train on'}: give more rows, shorter ones, or another "
                "--validation"
            )
        packed[held] = pack(examples, context)
        n_bytes = sum(example.n_bytes for example in examples)
    heldout = []
    if drawn:
        scored = packed[True]
        predicted = int((scored.targets != IGNORE).sum())
        heldout = [HeldOut(VALID, predicted, n_bytes, lambda limit: some(scored, limit))]
    return Divided(packed[False], heldout, shown, n_long, n_cut)


def some(rows: Rows, limit: int | None) -> Rows:
    """All rows, or `limit` of them spread evenly."""
    n = len(rows.tokens) if limit is None else min(limit, len(rows.tokens))
    return rows.part([i * len(rows.tokens) // n for i in range(n)])


def sample_prompts(
    config: "FinetuneConfig",
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


def make_room(
    decoder: Decoder, old: Tokenizer, new: Tokenizer, config: "FinetuneConfig"
) -> tuple[Decoder, list[tuple[str, str]]]:
    """The decoder with rows for the tokens that a template adds, and what the table says of that.

    Raises:
        UserError: adapters are trained, which leave the embedding as it is.
    """
    added = new.vocab_size - old.vocab_size
    if not added:
        return decoder, []
    if config.lora.lora_rank is not None:
        raise UserError(
            f"the template has {added} tokens that are new to the model, and adapters do not train the "
            "embedding: give --template plain, which needs none, or train all weights"
        )
    before, wider = decoder.config, with_room(decoder.config, new.vocab_size)
    weights = dict(decoder.state_dict())
    for leaf, axis in vocabulary_leaves(wider):
        name = leaf.torch_name()
        rows = with_rows(
            weights[name].numpy(), 1 - axis if leaf.transposed else axis, old.vocab_size, wider.vocab_size
        )
        weights[name] = torch.from_numpy(rows)
    grown = "" if wider == before else f" (from {before.vocab_size:,} rows to {wider.vocab_size:,})"
    what = f"{added} of the template, each begun as the mean of all others{grown}"
    return decoder_of(wider, weights), [("new tokens", what)]
