"""`kernels_cuda.bench`: the ways of a task compute the same, and the GPU's time holds none of the host's."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config as compiled_gradients

from kernels_cuda import bench, bench_tasks
from kernels_cuda.bench_tasks import BF16, CYCLES, Clock, Made, Task


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tasks' tensors lie there, and ours runs by its plain formulas."""
    monkeypatch.setattr(bench_tasks, "DEVICE", "cpu")
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


MADE: dict[str, Callable[[], Made]] = {
    "norms": lambda: bench_tasks.norms(16, 32, BF16),
    "norms, float32": lambda: bench_tasks.norms(16, 32, torch.float32),
    "norm alone": lambda: bench_tasks.norm_alone(16, 32),
    "q, k, v": lambda: bench_tasks.projections(2, 8, 32, (3, 1, 1), 16),
    "swiglu": lambda: bench_tasks.swiglu_mlps(16, 32, 48),
    "gelu": lambda: bench_tasks.gelu_mlps(16, 32, 48),
    "loss": lambda: bench_tasks.losses(16, 32, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_all_ways_compute_the_same_and_donate_where_users_do(on_a_cpu: None, name: str):
    """Sums of up to 64 products of bfloat16 numbers, each rounded to 2^-9 and in another order: 2% of the
    largest. Compiled gradients may overwrite what they are given, but where they are timed many times after
    one forward pass."""
    first: dict[str, tuple[torch.Tensor, ...]] = {}
    for task, implementation, function in MADE[name]():
        results = function()
        function()  # it is timed many times
        results = [r.float() for r in (results if isinstance(results, tuple) else (results,))]
        assert compiled_gradients.donated_buffer == (not name.startswith("norm")), implementation
        if task.name.endswith("backward"):
            continue  # of other random gradients in every way
        for ours, theirs in zip(first.setdefault(task.name, results), results, strict=True):
            assert (ours - theirs).abs().max() <= 0.02 * ours.abs().max(), (task.name, implementation)
    assert compiled_gradients.donated_buffer


class Gpu:
    """A GPU and its host: each has a time of its own, in milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.host = self.device = 0.0
        gpu = self

        class Event:
            def record(self) -> None:
                gpu.device = self.at = max(gpu.device, gpu.host)

            def query(self) -> bool:
                return gpu.host >= self.at

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        def sleep(cycles: int) -> None:
            self.device = max(self.device, self.host) + cycles / CYCLES

        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self) -> None:
        """The host waits for the GPU."""
        self.host = max(self.host, self.device)

    def call(self, host: float, device: float, waits: bool = False) -> Callable[[], None]:
        """Launches something: so many milliseconds of the host, and then of the GPU."""

        def function() -> None:
            if waits:
                self.wait()
            self.host += host
            self.device = max(self.device, self.host) + device

        return function


@pytest.mark.parametrize("host", [0.1, 3.0, 12.0])
def test_the_hosts_time_is_not_counted(monkeypatch: pytest.MonkeyPatch, host: float):
    """An eager optimizer's step is a millisecond of the host or several, which counted as the GPU's."""
    monkeypatch.setattr(bench_tasks, "DEVICE", "cpu")
    gpu = Gpu(monkeypatch)
    timing = Clock(5)(gpu.call(host, 0.5))
    assert timing.milliseconds == pytest.approx(0.5) and not timing.host


@pytest.mark.parametrize(("host", "waits"), [(0.1, True), (100.0, False)])
def test_a_time_that_holds_the_hosts_is_marked(monkeypatch: pytest.MonkeyPatch, host: float, waits: bool):
    monkeypatch.setattr(bench_tasks, "DEVICE", "cpu")
    gpu = Gpu(monkeypatch)
    assert Clock(5)(gpu.call(host, 0.5, waits)).host


def test_the_command_leaves_gradients_as_users_have_them(monkeypatch: pytest.MonkeyPatch, capsys):
    """It turned donated buffers off for all tasks: the compiled loss then needs its logits twice over."""
    seen = []

    def made() -> Made:
        yield Task("task", bytes=8), "mtlm", lambda: seen.append(compiled_gradients.donated_buffer)

    cuda = {"empty_cache": lambda: None, "get_device_name": lambda: "a GPU"}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("kernels_cuda.library.load", lambda kernels: None)
    monkeypatch.setattr(bench_tasks, "TASKS", {"task": made})
    monkeypatch.setattr(bench_tasks, "ceilings", lambda clock: (1.0, 1.0))
    timed = itertools.repeat((1.0, True))
    monkeypatch.setattr(bench_tasks, "Clock", lambda calls: lambda function: (function(), next(timed))[1])
    monkeypatch.setattr("sys.argv", ["kernels_cuda.bench"])
    with torch._dynamo.config.patch(
        fail_on_recompile_limit_hit=False
    ):  # and put back: monkeypatch deletes it
        bench.main()
        assert seen == [True] and torch._dynamo.config.fail_on_recompile_limit_hit
    assert "with time of the host" in capsys.readouterr().out
