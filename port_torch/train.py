"""`python -m port_torch.train`: the PyTorch mirror trained, on a GPU, on several (`torchrun`), or on a CPU.

From scratch it starts from the parameters of core.model.init_params, of the same seed as `train_tpu.run` to
the bit, or with --from from an exported folder. The data and their order are those of `train_tpu.run`.
What the command does is in training/pretraining.py, which is imported once it is known that it can be done.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from core import cli
from core.config import preset
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.hub_models import pinned
from core.run.folder import require_folder, settings_of_run
from core.run.help import TRAINING_OPTIONS, for_help
from core.run.presets import TRAINING_DEFAULTS
from core.run.settings import PretrainingSource, given_value, model_config
from port_torch.training.settings import MirrorOptimizerConfig, TrainerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(TrainerConfig, PretrainingSource):
    """Train the PyTorch mirror, from scratch or from an exported folder; the same command resumes.

    The optimizer is AdamW, at its own learning rates; with --optimizer muon both are as in train_tpu.run.
    """

    compiled_by_default = True

    init_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from this exported folder, or from hf:OWNER/NAME[@REVISION] on the Hugging Face Hub, instead of
    random parameters. Of --preset only the defaults of batch, rate and schedule are used."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json (,bos=TOKEN,eos=TOKEN: see train_tpu.prepare). Default:
    the prepared data's or the folder's; else bytes for the tiny presets and mistral for the others."""
    out: Path | None = None
    """The run folder. Default: runs/PRESET-torch. The trained model is written into its folder `model`."""
    compile: bool | None = None
    """Use torch.compile: some 10 s before the first update, for updates that take 1 to 4% less time (H200,
    CUDA kernels). Default: on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_source()


def main() -> int:
    """Runs the command; core.run.interrupt says what its exit codes mean."""
    config = parse(sys.argv[1:])
    check(config)
    if config.init_from:
        config = dataclasses.replace(config, init_from=pinned(config.init_from))
    from port_torch.training.pretraining import run  # slow: JAX and PyTorch

    return run(config, out_folder(config))


def parse(argv: list[str]) -> TrainConfig:
    """The command line over the settings of the run in its --out, else over its preset's defaults."""
    name = given_value(argv, "--preset") or TrainConfig.preset
    preset(name)  # refuses an unknown name
    given = TRAINING_DEFAULTS[name]
    optim = MirrorOptimizerConfig(lr=None, warmup=given["warmup"], decay=given["decay"])
    default = TrainConfig(preset=name, batch=given["batch"], optim=optim)
    out = given_value(argv, "--out")
    found = settings_of_run(Path(out) if out else out_folder(default), default, argv)
    starts = found.init_from or given_value(argv, "--from")  # then the folder says what the model is
    found = for_help(found, argv, from_preset=not starts)
    return cli.parse(
        TrainConfig, argv, prog="python -m port_torch.train", default=found, groups=TRAINING_OPTIONS
    )


def out_folder(config: TrainConfig) -> Path:
    """The run folder: the one given, or of a name that `train_tpu.run` does not take."""
    return config.out or Path("runs") / f"{config.preset}-torch"


def check(config: TrainConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    require_folder(out_folder(config))
    if config.init_from:
        require_kind(config.init_from, "start", Kind.WEIGHTS)
        require_no_overrides(config)
    else:
        model_config(config, vocab_size=1)  # what no model can be


def require_no_overrides(config: TrainConfig) -> None:
    """A UserError where the settings would change the model of a folder."""
    changed = [name for name, value in dataclasses.asdict(config.model).items() if value is not None]
    if changed:
        raise UserError(
            f"--{changed[0].replace('_', '-')} and --from do not go together: the folder says what its model "
            "is"
        )


if __name__ == "__main__":
    run_command(main)
