"""Fine-tuning on the rows of a file: from what the command was given to the `Job` that is trained."""

from typing import TYPE_CHECKING

import torch

from core.config import ModelConfig
from core.data.row_packing import packed_batches
from core.data.tuning_rows import RowFile
from core.run.tuning_data import make_tuning_data
from core.vocabulary import vocabulary_leaves, with_rows
from port_torch.model import Decoder, decoder_of
from port_torch.training.batches import empty_rows
from port_torch.training.distributed import Distributed, open_distributed
from port_torch.training.lora import add_adapters
from port_torch.training.pretrained import open_pretrained
from port_torch.training.setup import Job, begin, require_deterministic_operations
from port_torch.training.trainer import train

if TYPE_CHECKING:
    from port_torch.finetune import FinetuneConfig


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
    decoder, old, mine = pretrained.decoder, pretrained.tokenizer, ranks.rows(config.batch)
    data = make_tuning_data(config, file, old, pretrained.chat_template, decoder.config)
    model, divided = data.model, data.divided
    if data.tokenizer.vocab_size > old.vocab_size:
        decoder = with_new_tokens(decoder, old.vocab_size, model)
    if config.lora.lora_rank is not None:
        add_adapters(decoder, config.lora, config.seed)
    return Job(
        config=config,
        out=config.out,
        defaults=type(config)(init_from=config.init_from, data=config.data, out=config.out),
        decoder=decoder.to(ranks.device),
        tokenizer=data.tokenizer,
        record=data.record(config),
        lineage=[*pretrained.lineage[:-1], pretrained.lineage[-1] | data.told],
        steps=data.steps,
        batches=lambda start: packed_batches(
            divided.train, seed=config.seed, batch=config.batch, start=start, rows=mine
        ),
        example=lambda n: empty_rows(n, model.context, packed=True),
        heldout=divided.heldout,
        prompts=data.prompts,
        table=data.table,
        lora=None if config.lora.lora_rank is None else config.lora,
    )


def with_new_tokens(decoder: Decoder, known: int, wider: ModelConfig) -> Decoder:
    """The decoder as the model `wider`, whose rows behind the first `known` are begun anew."""
    weights = dict(decoder.state_dict())
    for leaf, axis in vocabulary_leaves(wider):
        name = leaf.torch_name()
        axis = 1 - axis if leaf.transposed else axis
        weights[name] = torch.from_numpy(with_rows(weights[name].numpy(), axis, known, wider.vocab_size))
    return decoder_of(wider, weights)
