"""Pretraining of the mirror: from what port_torch.train was given to the `Job` that is trained."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from core.checkpoint.steps import list_steps
from core.config import ModelConfig
from core.data.batches import data_record, require_records, train_batches
from core.data.sequences import heldout_sets
from core.documents import document_mark
from core.run.data import choose_run_tokenizer, data_rows, open_data, trained_before
from core.run.folder import run_record
from core.run.presets import TRAINING_DEFAULTS, count_steps
from core.run.rates import with_rate
from core.run.settings import model_config
from core.sampling import require_room
from core.tokenizer import require_same, tokenizer_record
from port_torch.export import reader
from port_torch.model import Decoder, decoder_of, parameter_name, without_weights
from port_torch.names import exported_tensors
from port_torch.training.batches import empty_rows, pretraining_batches
from port_torch.training.distributed import Distributed, open_distributed
from port_torch.training.pretrained import open_pretrained
from port_torch.training.setup import Job, begin, require_deterministic_operations
from port_torch.training.trainer import train

if TYPE_CHECKING:
    from pathlib import Path

    from port_torch.train import TrainConfig


def run(config: "TrainConfig", out: "Path") -> int:
    """Trains; returns the exit code of `core.run.interrupt`."""
    if config.deterministic:
        require_deterministic_operations()
    with open_distributed(config.device) as ranks:
        return train(make_job(config, out, ranks), ranks)


def make_job(config: "TrainConfig", out: "Path", ranks: Distributed) -> Job:
    """Model and data of a run."""
    config = begin(config, out, ranks)
    if config.init_from:
        pretrained = open_pretrained(config.init_from, "train", config.tokenizer)
        decoder, tokenizer, template, lineage = pretrained
        if config.steps is None and config.epochs is None:
            config = dataclasses.replace(config, epochs=1.0)
        context = decoder.config.context
        dataset = ranks.in_turn(lambda: open_data(config, tokenizer.name, context, out))
        require_same(
            tokenizer_record(tokenizer), dataset.tokenizer_record, str(config.init_from), "the data given"
        )
    else:
        given = TRAINING_DEFAULTS[config.preset]
        tokenizer = choose_run_tokenizer(config, given["tokenizer"])
        template, lineage = None, []
        model = model_config(config, tokenizer.vocab_size)
        dataset = ranks.in_turn(lambda: open_data(config, tokenizer.name, model.context, out))
        resumes = list_steps(out / "checkpoints")
        decoder = blank_decoder(model) if resumes else drawn_on_the_cpu(model, config.seed)
    model, rows = decoder.config, ranks.rows(config.batch)
    require_records(dataset, config.leave_out, "--leave-out")
    before = trained_before(config, out)
    steps = count_steps(config, dataset, before)
    config, of_rate = with_rate(config, model, steps)
    prompts = [tokenizer.begin(prompt) for prompt in config.prompts]
    if prompts:
        require_room(prompts, model.context)
    mark = document_mark(tokenizer) if config.document_mask else None
    record = run_record(config, model, steps, dataset.tokenizer_record, data_record(dataset))
    if template is not None:
        record["chat_template"] = template
    return Job(
        config=config,
        out=out,
        defaults=type(config)(),
        decoder=decoder.to(ranks.device),
        tokenizer=tokenizer,
        record=record,
        lineage=lineage,
        steps=steps,
        batches=lambda start: pretraining_batches(
            train_batches(
                dataset, seed=config.seed, batch=config.batch, start=start, rows=rows,
                vocab_size=tokenizer.vocab_size, on_bad=config.on_bad_record, leave_out=config.leave_out,
            ),
            mark,
        ),
        example=lambda n: empty_rows(n, model.context, packed=mark is not None),
        heldout=heldout_sets(dataset, mark),
        prompts=prompts,
        table=[
            ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"),
            *data_rows(config, dataset, before.sequences_at(steps, config.batch)),
            *of_rate,
        ],
    )  # fmt: skip


def blank_decoder(model: ModelConfig) -> Decoder:
    """The mirror with zeros, for parameters to be restored into."""
    weights = without_weights(model).state_dict()
    return decoder_of(model, {name: torch.zeros(w.shape, dtype=w.dtype) for name, w in weights.items()})


def drawn_on_the_cpu(model: ModelConfig, seed: int) -> Decoder:
    """`fresh_decoder` in a process whose GPU is PyTorch's."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    return fresh_decoder(model, seed)


def fresh_decoder(model: ModelConfig, seed: int) -> Decoder:
    """The mirror with the parameters that `train_tpu.run` starts from: drawn by JAX, the same to the bit."""
    import jax  # slow, and only a new run needs it

    from core.keys import Purpose, make_key
    from core.model import init_params

    params = jax.jit(lambda seed: init_params(model, make_key(seed, Purpose.INIT)))(jax.numpy.uint32(seed))
    read = reader(params)
    leaves = exported_tensors(model).values()
    copied = {"memory_format": torch.contiguous_format}  # of JAX's memory, which is not to be written to
    weights = {parameter_name(leaf): read(leaf).clone(**copied) for leaf in leaves}
    return decoder_of(model, weights)
