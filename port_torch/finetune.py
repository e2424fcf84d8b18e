"""`python -m port_torch.finetune FOLDER --data FILE.jsonl --out DIR`: a folder's model trained on rows.

Rows are texts, or prompts with responses, of which only the responses are learned (training/rows.py); they
are packed without seeing each other (training/packing.py). All weights are trained, or LoRA adapters, which
are merged into the result. main() is the course up to what both training commands share (training/course.py).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from core import checks, cli
from core.errors import UserError, run_command
from core.loss import IGNORE
from core.tokenizer import Tokenizer, tokenizer_record
from port_torch.training.batches import HeldOut, Rows, empty_rows
from port_torch.training.course import Job, require_deterministic_operations, train
from port_torch.training.lora import add_adapters
from port_torch.training.origin import open_origin
from port_torch.training.packing import PADDING, pack, packed_batches
from port_torch.training.ranks import Ranks, open_ranks
from port_torch.training.rows import Row, RowFile, examples_of, instruction, read_rows, tuning
from port_torch.training.settings import AdamWConfig, TrainerConfig
from train_tpu.data import record_at
from train_tpu.run_folder import run_record

EPOCHS = 3.0
SAMPLES = 3
VALID = "valid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainerConfig):
    """Fine-tune an exported model on rows of text, or of prompts and responses; the same command resumes."""

    init_from: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The exported folder to start from, or a Llama's of Hugging Face that fits."""
    data: Path
    """A JSONL file: rows {"text"}, {"prompt", "response"} or {"instruction", "input", "output"}; only
    responses are learned."""
    out: Path
    """The run folder. The model comes to lie in its folder `model`."""
    validation: float = 0.05
    """Part of the rows that are scored and not trained on; 0 for none."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights; 8 to 64 are common."""
    lora_alpha: float | None = None
    """What the adapters add is multiplied by this over the rank. Default: twice the rank."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the folder's own."""
    epochs: float | None = None
    """Passes over the rows. Default: 3."""
    batch: int = 16
    """Packed sequences an update, over all GPUs."""
    optim: AdamWConfig = AdamWConfig(lr=1e-4, schedule="cosine", warmup=10, weight_decay=0.0)
    prompts: tuple[str, ...] = ()
    """What the samples go on from; put into the form of the rows. Default: prompts of held-out rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.below_one(validation=self.validation)
        checks.counts(lora_rank=self.lora_rank)
        checks.positive(lora_alpha=self.lora_alpha)
        if self.lora_alpha is not None and self.lora_rank is None:
            raise UserError("--lora-alpha scales adapters: give --lora-rank with it")


def main() -> int:
    """Runs the command; train_tpu.interrupt says what its exit codes mean."""
    config = cli.parse(
        FinetuneConfig, prog="python -m port_torch.finetune", description=FinetuneConfig.__doc__
    )
    if config.deterministic:
        require_deterministic_operations()
    with open_ranks(config.device) as ranks:
        return train(make_job(config, ranks), ranks)


def make_job(config: FinetuneConfig, ranks: Ranks) -> Job:
    """Model and data of a run."""
    file = read_rows(config.data)
    origin = open_origin(config.init_from, "finetune", config.tokenizer)
    decoder, tokenizer = origin.decoder, origin.tokenizer
    model, mine = decoder.config, ranks.rows(config.batch)
    divided = divide(file, tokenizer, model.context, config)
    if config.lora_rank:
        add_adapters(decoder, config.lora_rank, config.lora_alpha or 2 * config.lora_rank, config.seed)
    n = len(divided.train.tokens)
    steps = config.steps or max(1, round((config.epochs or EPOCHS) * n / config.batch))
    record = tokenizer_record(tokenizer)
    contents = [file.sha256, record["sha256"], model.context, config.validation, config.seed]
    fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    filled = float((divided.train.documents != PADDING).mean())
    form = tuning(file.form)
    return Job(
        config=config,
        out=config.out,
        defaults=FinetuneConfig(init_from=config.init_from, data=config.data, out=config.out),
        decoder=decoder.to(ranks.device),
        tokenizer=tokenizer,
        record=run_record(config, model, steps, record, fingerprint),
        lineage=origin.lineage,
        steps=steps,
        batches=lambda start: packed_batches(
            divided.train, seed=config.seed, batch=config.batch, start=start, rows=mine
        ),
        example=lambda n: empty_rows(n, model.context, packed=True),
        heldout=divided.heldout,
        prompts=sample_prompts(config, file.form, divided.shown, tokenizer, model.context),
        table=[
            ("started from", str(config.init_from)),
            ("trained", f"LoRA adapters of rank {config.lora_rank}" if config.lora_rank else "all weights"),
            ("data", f"{config.data}: {len(file.rows):,} rows of {file.form!r}, packed into {n:,} sequences, "
                     f"{filled:.0%} filled"),
            ("left out", f"{divided.n_long:,} rows, which are longer than the context"),
        ],
        tuning=form,
    )  # fmt: skip


class Divided(NamedTuple):
    """The rows of a file as what is trained on and what is not."""

    train: Rows
    heldout: list[HeldOut]
    shown: list[Row]
    """Held-out rows (training ones where none are held out), for samples."""
    n_long: int
    """Rows that do not fit into the context and are left out."""


def divide(file: RowFile, tokenizer: Tokenizer, context: int, config: FinetuneConfig) -> Divided:
    """Holds out the share of the rows that is asked for, drawn by the seed, and packs both parts.

    Raises:
        UserError: no row is left to train on or to score.
    """
    n, n_long = len(file.rows), 0
    n_valid = max(1, round(config.validation * n)) if config.validation and n > 1 else 0
    drawn = {record_at(i, n, config.seed) for i in range(n_valid)}
    packed, n_bytes, shown = {}, 0, []
    for held in (False, True):
        examples = []
        for number, row in enumerate(file.rows):
            if (number in drawn) is not held:
                continue
            of_row = examples_of(row, tokenizer, context)
            n_long += not of_row
            examples += of_row
            if of_row and held is bool(drawn):
                shown.append(row)
        if not examples and (drawn or not held):
            raise UserError(
                f"of the {n} rows of {config.data} none that fits into the context of {context} tokens is "
                f"left to {'score' if held else 'train on'}: give more rows, shorter ones, or another "
                "--validation"
            )
        packed[held] = pack(examples, context)
        n_bytes = sum(example.n_bytes for example in examples)
    heldout = []
    if drawn:
        scored = packed[True]
        predicted = int((scored.targets != IGNORE).sum())
        heldout = [HeldOut(VALID, predicted, n_bytes, lambda limit: some(scored, limit))]
    return Divided(packed[False], heldout, shown, n_long)


def some(rows: Rows, limit: int | None) -> Rows:
    """All rows, or `limit` of them spread evenly."""
    n = min(len(rows.tokens), limit or len(rows.tokens))
    return rows.part([i * len(rows.tokens) // n for i in range(n)])


def sample_prompts(
    config: FinetuneConfig, form: str, shown: list[Row], tokenizer: Tokenizer, context: int
) -> list[list[int]]:
    """Ids that the samples go on from: --prompts in the form of the rows, or the beginnings of rows."""
    if config.prompts:
        texts = [instruction(text) if form == "instruction" else text for text in config.prompts]
    else:
        texts = [row.prompt or " ".join(row.response.split()[:6]) for row in shown]
    ids = [tokenizer.begin(text) for text in texts]
    if config.prompts:
        return ids
    return [prompt for prompt in ids if len(prompt) <= context // 2][:SAMPLES]


if __name__ == "__main__":
    run_command(main)
