"""Every number that a command takes is checked: none lets nan, infinity or nonsense through."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from bench.decode import DecodeBenchConfig
from bench.eval import EvalBenchConfig
from bench.finetune import FinetuneBenchConfig
from bench.loader import LoaderConfig
from bench.step import StepBenchConfig
from bench.train import TrainBenchConfig
from core import checks
from core.config import preset
from core.errors import UserError
from core.generate import GenerateConfig
from core.lora import LoraConfig
from core.run.schedule import OptimizerConfig
from core.run.settings import ModelOverrides
from core.sampling import Sampling
from eval.perplexity import PerplexityConfig
from eval.run import EvalConfig
from port_torch import generate as torch_generate
from port_torch.chat import ChatConfig
from port_torch.finetune import FinetuneConfig
from port_torch.import_checkpoint import ImportConfig
from port_torch.train import TrainConfig
from port_torch.training.settings import MirrorOptimizerConfig
from stacking.advise.config import AdviseConfig
from stacking.grow import GrowConfig
from stacking.study.config import StudyConfig
from train_tpu import config as jax_settings
from train_tpu.aot.__main__ import AotConfig
from train_tpu.config import RunConfig
from train_tpu.step import GuardConfig

X = Path("x")
CONFIGS = [
    RunConfig(), ModelOverrides(), OptimizerConfig(), GuardConfig(), preset("mtlm1-tiny"), TrainConfig(),
    MirrorOptimizerConfig(), FinetuneConfig(init_from=X, data=X, out=X), LoraConfig(lora_rank=8),
    jax_settings.FinetuneConfig(init_from=X, data=X, out=X),
    GenerateConfig(X), Sampling(), ChatConfig(X),
    torch_generate.GenerateConfig(X), EvalConfig(X), PerplexityConfig(X), GrowConfig(X),
    StudyConfig("tuning"), AdviseConfig(X),
    AotConfig(), ImportConfig(X, X), DecodeBenchConfig(), EvalBenchConfig(X, X), LoaderConfig(),
    StepBenchConfig(), TrainBenchConfig(), FinetuneBenchConfig(X),
]  # fmt: skip
WRONG = {float: (math.nan, math.inf, -math.inf, -5.0), int: (-5, 2**70)}


def numbers(config: Any) -> Iterator[tuple[str, type, bool]]:
    """Name, type, and whether it is of many, for every field that holds numbers."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = {hint, *get_args(hint)}
        many = any(getattr(kind, "__origin__", None) in (tuple, list) for kind in kinds)
        kinds |= {inner for kind in kinds for inner in get_args(kind)}
        yield from ((name, kind, many) for kind in (int, float) if kind in kinds)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{type(config).__module__}")
def test_no_number_is_taken_unchecked(config):
    for name, kind, many in numbers(config):
        for value in WRONG[kind]:
            with pytest.raises(UserError, match=rf"--{name.replace('_', '-')}\b|model.{name}\b"):
                dataclasses.replace(config, **{name: (value,) if many else value})
                pytest.fail(f"{type(config).__name__}.{name} = {value} is accepted")


def test_the_bounds():
    checks.fractions(a=0, b=1, c=None)
    checks.below_one(a=0)
    checks.above_zero_to_one(a=1)
    checks.counts(0, a=0)
    checks.seeds(a=0, b=checks.MAX_SEED)
    for check, value in (
        (checks.below_one, 1.0),
        (checks.between_zero_and_one, 0.0),
        (checks.above_zero_to_one, 0.0),
        (checks.positive, 0.0),
        (checks.counts, 0),
        (checks.seeds, checks.MAX_SEED + 1),
        (checks.not_negative, "1"),
        (checks.positive, True),
        (checks.counts, 3.0),
        (checks.counts, 2**31),
    ):
        with pytest.raises(UserError, match=f"^--a-number is {value!r}; it must"):
            check(a_number=value)
