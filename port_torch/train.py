"""`python -m port_torch.train`: the PyTorch mirror trained, on a GPU, on several (`torchrun`), or on a CPU.

From scratch it starts from the parameters of core.model.init_params, of the same seed as `train_tpu.run` to
the bit, or with --from from an exported folder. The data and their order are those of `train_tpu.run`.
main() is the course up to what both training commands share (training/course.py).
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import torch
import tyro

from core import cli
from core.cli import Maybe
from core.config import ModelConfig
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.folders import CACHE
from core.keys import Purpose, make_key
from core.model import init_params
from core.sampling import require_room
from core.tokenizer import require_same, tokenizer_record
from port_torch.export import reader
from port_torch.model import Decoder, parameter_name
from port_torch.names import exported_tensors
from port_torch.training.batches import empty_rows, heldout_sets, pretraining_batches
from port_torch.training.course import Job, begin, require_deterministic_operations, train
from port_torch.training.origin import open_origin
from port_torch.training.ranks import Ranks, open_ranks
from port_torch.training.settings import AdamWConfig, TrainerConfig
from train_tpu import config as theirs
from train_tpu.config import ModelOverrides
from train_tpu.data import Dataset
from train_tpu.prepare import choose_tokenizer, open_or_prepare
from train_tpu.run import count_steps, given_value, settings_of_run
from train_tpu.run_folder import require_folder, run_record

# Peak learning rates of AdamW; those of train_tpu.run are for Muon, which bears higher ones. For the larger
# presets they are those of the AdamW runs in docs/RESULTS.md; docs/LOG.md has the tiny ones'.
ADAMW_RATES = {
    "mtlm1-tiny": 3e-3,
    "mtlm2-tiny": 3e-3,
    "mtlm1-88m": 1e-3,
    "mtlm1-200m": 1e-3,
    "mtlm2-40m": 1.5e-3,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(TrainerConfig):
    """Train the PyTorch mirror with AdamW, from scratch or from an exported folder; the same command resumes.

    The learning rates are AdamW's: train_tpu.run trains with Muon, at others.
    """

    preset: str = "mtlm1-tiny"
    """mtlm1-88m, mtlm1-200m, mtlm2-40m, mtlm1-tiny or mtlm2-tiny."""
    init_from: Annotated[Maybe[Path], tyro.conf.arg(name="from")] = None
    """Start from this exported folder instead of a preset with random parameters."""
    data: str = "builtin"
    """A prepared folder, text files (.txt, .jsonl, .json, .parquet, also .gz, .bz2, .xz, .zst), a folder,
    a glob, tfds:NAME, hf:DATASET, or the built-in corpus of English documentation."""
    tokenizer: Maybe[str] = None
    """mistral, bytes or a path to a tokenizer.json. Default: the prepared data's or the folder's; else bytes
    for the tiny presets and mistral for the others."""
    out: Maybe[Path] = None
    """The run folder. Default: runs/PRESET-torch. The model comes to lie in its folder `model`."""
    model: ModelOverrides = ModelOverrides()
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A damaged training record ends the run, or its sequence is left out of the loss."""


def main() -> int:
    """Runs the command; train_tpu.interrupt says what its exit codes mean."""
    config = parse(sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")  # JAX only draws the first parameters here
    if config.deterministic:
        require_deterministic_operations()
    require_folder(out_folder(config))
    with open_ranks(config.device) as ranks:
        return train(make_job(config, ranks), ranks)


def parse(argv: list[str]) -> TrainConfig:
    """The command line over the settings of the run in its --out, else over its preset's defaults."""
    preset = given_value(argv, "--preset") or TrainConfig.preset
    ours = theirs.defaults(preset)
    optim = AdamWConfig(lr=ADAMW_RATES[preset], warmup=ours.optim.warmup)
    default = TrainConfig(preset=preset, batch=ours.batch, optim=optim)
    out = given_value(argv, "--out")
    found = settings_of_run(Path(out) if out else out_folder(default), default, argv)
    found = found if found.init_from or given_value(argv, "--from") else theirs.for_help(found, argv)
    return cli.parse(
        TrainConfig, argv, prog="python -m port_torch.train", default=found, description=TrainConfig.__doc__
    )


def out_folder(config: TrainConfig) -> Path:
    """The run folder: the one given, or of a name that `train_tpu.run` does not take."""
    return config.out or Path("runs") / f"{config.preset}-torch"


def make_job(config: TrainConfig, ranks: Ranks) -> Job:
    """Model and data of a run."""
    config = begin(config, out_folder(config), ranks)
    if config.init_from:
        require_kind(config.init_from, "start", Kind.WEIGHTS)
        require_no_overrides(config)
        decoder, tokenizer, lineage = open_origin(config.init_from, "train", config.tokenizer)
        if config.steps is None and config.epochs is None:
            config = dataclasses.replace(config, epochs=1.0)
        dataset = open_data(config, tokenizer.name, decoder.config.context, ranks)
        require_same(
            tokenizer_record(tokenizer), dataset.tokenizer_record, str(config.init_from), "the data given"
        )
    else:
        given = theirs.TRAINING_DEFAULTS[config.preset]
        theirs.model_config(config, vocab_size=1)  # what no model can be is refused before anything slow
        tokenizer, lineage = choose_tokenizer(config.tokenizer, config.data, given["tokenizer"]), []
        model = theirs.model_config(config, tokenizer.vocab_size)
        dataset = open_data(config, tokenizer.name, model.context, ranks)
        decoder = fresh_decoder(model, config.seed)
    model, rows = decoder.config, ranks.rows(config.batch)
    steps = count_steps(config, dataset)
    prompts = [tokenizer.begin(prompt) for prompt in config.prompts]
    if prompts:
        require_room(prompts, model.context)
    heldout = ", ".join(f"{name} ({dataset.splits[name].bytes:,} bytes)" for name in dataset.heldout)
    tokens = dataset.splits["train"].tokens
    return Job(
        config=config,
        out=out_folder(config),
        defaults=TrainConfig(),
        decoder=decoder.to(ranks.device),
        tokenizer=tokenizer,
        record=run_record(config, model, steps, dataset.tokenizer_record, dataset.fingerprint),
        lineage=lineage,
        steps=steps,
        batches=lambda start: pretraining_batches(
            dataset, seed=config.seed, batch=config.batch, start=start, rows=rows,
            vocab_size=model.vocab_size, on_bad=config.on_bad_record,
        ),
        example=lambda n: empty_rows(n, model.context, packed=False),
        heldout=heldout_sets(dataset),
        prompts=prompts,
        table=[
            ("tokenizer", f"{tokenizer.name}, {model.vocab_size:,} ids"),
            ("data", f"{config.data}: {tokens:,} tokens"),
            ("held out", heldout or "none"),
        ],
    )  # fmt: skip


def open_data(config: TrainConfig, tokenizer: str, context: int, ranks: Ranks) -> Dataset:
    """The dataset; text is prepared by the first rank while the others wait."""
    return ranks.in_turn(lambda: open_or_prepare(config.data, tokenizer, context, CACHE))


def require_no_overrides(config: TrainConfig) -> None:
    """A UserError where the settings would change the model of a folder."""
    changed = [name for name, value in dataclasses.asdict(config.model).items() if value is not None]
    if changed:
        raise UserError(
            f"--{changed[0].replace('_', '-')} and --from do not go together: the folder says what its model "
            "is"
        )


def fresh_decoder(model: ModelConfig, seed: int) -> Decoder:
    """The mirror with the parameters that `train_tpu.run` starts from: drawn by JAX, the same to the bit."""
    params = jax.jit(lambda seed: init_params(model, make_key(seed, Purpose.INIT)))(jax.numpy.uint32(seed))
    read = reader(params)
    with torch.device("meta"):
        decoder = Decoder(model)
    leaves = exported_tensors(model).values()
    copied = {"memory_format": torch.contiguous_format}  # of JAX's memory, which is not to be written to
    weights = {parameter_name(leaf): read(leaf).clone(**copied) for leaf in leaves}
    decoder.load_state_dict(weights, assign=True)
    return decoder


if __name__ == "__main__":
    run_command(main)
