"""`python -m train_tpu.aot`: what the TPU's compiler makes of the training step, on a machine without a TPU.

What the command does is in train_tpu/aot/report.py, imported once it is known that it can be done.
"""

import dataclasses
import json
from typing import Annotated, Literal

import tyro

from core import cli
from core.config import preset
from core.errors import run_command
from core.run.help import TRAINING_OPTIONS
from core.run.schedule import OptimizerConfig
from core.run.settings import ModelOverrides, model_config
from train_tpu.aot.topology import parse_topology
from train_tpu.config import RunConfig

EXIT_DOES_NOT_FIT = 1
OPTIONS = TRAINING_OPTIONS | {"options": ("preset", "topology", "batch", "mesh", "remat", "json")}
Unused = Annotated[None, tyro.conf.Suppress, tyro.conf.Fixed]
"""Of a setting that is not in the compiled step, or is a mere number there: no option."""


@dataclasses.dataclass(frozen=True)
class AotModel(ModelOverrides):
    """What changes the compiled step."""

    rope_theta: Unused = None
    norm_eps: Unused = None
    init_std: Unused = None
    scaled_residual_init: Unused = None


@dataclasses.dataclass(frozen=True)
class AotConfig:
    """Compile the training step for a TPU slice, without one, and print what the compiler says.

    Settings have the names and defaults that train_tpu.run gives them on a TPU; those that do not change the
    compiled program, such as the learning rate, are left out. The vocabulary is the preset's. Exit code 0:
    it fits; 1: it does not; 2: a mistake in the settings.
    """

    preset: str = "mtlm2-40m"
    """Of train_tpu.run's presets."""
    topology: str = "v5e:2x4"
    """The slice: GENERATION:XxY, of v5e or v6e."""
    batch: int = 256
    """Global batch size: sequences per optimizer step, summed over chips."""
    grad_accum_steps: int | None = None
    """Gradient accumulation: split each batch into this many micro-batches. Default: enough for 8,192
    tokens per chip."""
    mesh: str | None = None
    """Device mesh, as in train_tpu.run. Default: all chips on data."""
    model: AotModel = AotModel()
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the layers' weight matrices, AdamW for the rest. adamw: AdamW for everything."""
    weight_decay: float = 0.1
    """Of matrices and embeddings; 0: the program has none."""
    clip: float = 1.0
    """Global norm to which gradients are clipped; 0: the program does not clip."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype. auto: bfloat16."""
    attention: Literal["auto", "xla", "splash"] = "auto"
    """Attention implementation. auto: splash where it can."""
    unroll: int | None = None
    """Unroll factor of the scan over layers. Default: 1."""
    remat: Literal["none", "dots", "full"] | None = None
    """Activation rematerialization. Default: dots."""
    loss_chunk: int | None = None
    """Chunk size of the cross-entropy, in tokens per chip. Default: 256 if the output head fits in VMEM, else
    8192."""
    json: bool = False
    """Print everything as one JSON object; sizes in bytes, per chip."""

    def __post_init__(self) -> None:
        self.run_config()

    def run_config(self) -> RunConfig:
        """The same settings as a run has them; RunConfig refuses what is wrong."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        optim = OptimizerConfig(self.optimizer, weight_decay=self.weight_decay, clip=self.clip)
        return RunConfig(**{name: given[name] for name in given.keys() & names}, optim=optim)


def main() -> int:
    """Runs the command; returns its exit code."""
    config = cli.parse(AotConfig, prog="python -m train_tpu.aot", groups=OPTIONS)
    run = config.run_config()
    model = model_config(run, preset(config.preset).vocab_size)
    parse_topology(config.topology)
    from train_tpu.aot.report import compile_and_report, print_report  # slow: JAX

    report = compile_and_report(run, model, config.topology)
    if config.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0 if report["fits"] else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    run_command(main)
