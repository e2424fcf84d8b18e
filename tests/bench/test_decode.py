"""`bench.decode --profile`: at places that the cache has, of steps that can be told apart."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import decode
from core.config import ModelConfig
from core.errors import UserError
from port_torch.decode import Generator
from port_torch.model import Decoder

TINY = ModelConfig(vocab_size=64, context=256, d_model=16, n_layers=1, n_heads=2, d_mlp=32)


class Event(SimpleNamespace):
    """A GPU's event where there is none."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


@pytest.mark.parametrize("new", [1, 16, 240])
def test_the_profile_stays_inside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: int):
    """A position beyond the cache is an IndexError of the plain ops; the kernels would write somewhere else.

    One before 0 would be the cache's end.
    """
    generator, seen = Generator(Decoder(TINY).eval()), []
    list(generator.stream([[1] * 8], decode.GREEDY, new))
    (step,) = generator.steps.values()
    run = step.run
    monkeypatch.setattr(step, "run", lambda: (seen.append(int(step.position)), run()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    profiler = nullcontext(SimpleNamespace(key_averages=list))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profiler)
    decode.profile(generator, 1, 8, new, tmp_path / "profile.txt")
    assert len(seen) == 120 and min(seen) >= 0 and max(seen) < step.length
    assert "replayed 100 times" in (tmp_path / "profile.txt").read_text()


def test_a_batch_of_several_steps_has_no_profile():
    with pytest.raises(UserError, match="--profile looks at one step, of at most 64 rows: --batch 65"):
        decode.DecodeBenchConfig(batch=[1, 65], profile=Path("profile"))
