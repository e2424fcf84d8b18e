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


def test_every_way_is_timed_as_often_and_a_peer_that_fails_is_in_the_report(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def seconds(call: str, prompts: list[list[int]], new: int, calls: int) -> list[float]:
        if call == "static":
            raise RuntimeError("recompiled")
        asked.append((call, calls))
        return [1.0] * calls

    def hugging_face(config: ModelConfig, cache_implementation: str = "dynamic") -> str:
        return cache_implementation

    for name, value in {
        "preset": lambda name: TINY, "stock_type": lambda config: "llama", "hugging_face": hugging_face,
        "random_model": lambda config: None, "eager": lambda model: "eager", "graphed": lambda model: "graph",
        "Generator": lambda model: None, "ours": lambda generator, sampling: "ours", "seconds": seconds,
        "library": SimpleNamespace(load=lambda kernels: None),
    }.items():  # fmt: skip
        monkeypatch.setattr(decode, name, value)
    config = decode.DecodeBenchConfig(preset=["tiny"], batch=[1], new=8, calls=4, sampled=False)
    with torch._dynamo.config.patch(
        fail_on_recompile_limit_hit=False
    ):  # and put back: monkeypatch deletes it
        rows = decode.measure(config, 1e12)
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert asked == [(way, 4) for way in ("eager", "graph", "dynamic", "ours")]
    assert [row["way"] for row in rows if "failed" in row] == ["HF generate, static cache, compiled"]
    assert len(rows) == 5
    decode.print_table(rows)


@pytest.mark.slow
def test_hugging_face_generates_so_many_tokens_and_does_nothing_else(monkeypatch: pytest.MonkeyPatch):
    """It neither looks for the end of a text nor holds it back, which takes it time at every token."""
    pytest.importorskip("transformers")
    from transformers import GenerationMixin

    seen, sample = [], GenerationMixin._sample

    def seeing(model: GenerationMixin, *given: object, **more: object) -> torch.Tensor:
        seen.extend(type(one).__name__ for one in (*more["logits_processor"], *more["stopping_criteria"]))
        return sample(model, *given, **more)

    monkeypatch.setattr(GenerationMixin, "_sample", seeing)
    call = decode.hugging_face(TINY, device="cpu")
    assert call([[3, 4, 5], [6, 7, 8]], 40).shape == (2, 43)
    assert seen == ["MaxLengthCriteria"]
