"""Commands as users start them, on a model of seconds: in processes of their own, or in this one."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from core.errors import run_command
from core.run.log import read_log
from tests.checks import require
from tests.several_devices import devices_flags

ROOT = Path(__file__).parents[2]

# 12 updates of 4 x 32 tokens on a model of 24k parameters; dropout, so that keys matter too.
TINY = (
    "--preset", "mtlm1-tiny", "--tokenizer", "bytes", "--context", "32", "--d-model", "32", "--n-layers", "2",
    "--n-heads", "2", "--d-mlp", "64", "--dropout", "0.1", "--steps", "12", "--batch", "4",
    "--optimizer", "adamw", "--lr", "0.01", "--warmup", "4", "--window", "4",
    "--eval-every", "5", "--sample-every", "100", "--save-every", "3", "--log-every", "1",
    "--eval-windows", "4", "--prompts", "a",
)  # fmt: skip


def without(arguments: Sequence[str | Path], flag: str) -> list[str | Path]:
    """The arguments without a flag and its value."""
    at = list(arguments).index(flag)
    return [*arguments[:at], *arguments[at + 2 :]]


def make_text(folder: Path, repeats: int = 60) -> Path:
    """A text of a few hundred documents' worth of windows, the same every time."""
    path = folder / "text.jsonl"
    texts = (f"Document {i}: the square of {i} is {i * i}, its cube {i**3}." for i in range(repeats))
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Where the process keeps prepared data and compiled functions, and how many devices it sees.

    The tests of a session have one place for all (conftest.py), which comes before the one given here."""
    kept = {
        "MTLM_CACHE": str(cache / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return (
        kept
        | os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": devices_flags(devices),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
    )


def start(cache: Path, *arguments: str | Path, module: str = "train_tpu.run", **kwargs) -> subprocess.Popen:
    """Starts `python -m module`; stdout and stderr are pipes of text."""
    devices = kwargs.pop("devices", 1)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environ = environment(cache, devices) | kwargs.pop("environ", {})
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def run(cache: Path, *arguments: str | Path, expect: int = 0, **kwargs) -> tuple[str, str]:
    """Runs to the end and checks the exit code; gives stdout and stderr."""
    timeout = kwargs.pop("timeout", 300)
    process = start(cache, *arguments, **kwargs)
    out, err = process.communicate(timeout=timeout)
    code = process.returncode
    require(code == expect, f"exit code {code}, not {expect}:\n{out[-2000:]}\n{err}")
    return out, err


class Said(io.StringIO):
    """What a command in this process prints. `then` is called once, when a line with `moment` is complete."""

    def __init__(self, moment: str | None = None, then: Callable[[], None] = lambda: None):
        super().__init__()
        self._moment, self._then = moment, then

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._moment and "\n" in text and re.search(self._moment, self.getvalue()):
            self._moment = None
            self._then()
        return written


@functools.cache
def _kept(made: Callable[..., Any]) -> Callable[..., Any]:
    return functools.cache(made)


def write_rows(path: Path) -> Path:
    """30 conversations of one or two exchanges, to tune on."""
    rows = []
    for i in range(30):
        turns = [("user", f"{i} squared?"), ("assistant", f"{i * i}, " * (1 + i % 5))]
        turns += [("user", "And?"), ("assistant", "No.")] * (i % 3 == 0)
        rows.append({"messages": [{"role": role, "content": said} for role, said in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def compiled_once(drawn: bool = False) -> Iterator[None]:
    """JAX's runs in this process share their compiled steps and their fresh parameters: a step is a function
    of its settings, and lowering and loading it again is half of a run of seconds. Drawing a loss curve is a
    quarter of the rest, and only done where it is to be `drawn`."""
    import jax

    from core.run.guard import GuardConfig
    from train_tpu import setup, step, trainer

    def compiled(config: step.StepConfig) -> step.StepConfig:
        """Without what the step is given with every update: one serves every schedule and limit."""
        default = type(config.optim)()
        given = ("lr", "schedule", "warmup", "decay", "final_lr", "schedule_start", "rewarm", "rewarm_at")
        optim = dataclasses.replace(config.optim, **{name: getattr(default, name) for name in given})
        return dataclasses.replace(config, optim=optim, guard=GuardConfig(window=config.guard.window))

    def compile_step(config: step.StepConfig, *arguments: Any) -> jax.stages.Compiled:
        return _kept(step.compile_step)(compiled(config), *arguments)

    def fresh_state(config: step.StepConfig, *arguments: Any) -> step.TrainState:
        kept = _kept(step.fresh_state)(compiled(config), *arguments)
        return jax.tree.map(jax.numpy.copy, kept)  # a run donates it

    with (
        contextlib.nullcontext()
        if drawn
        else mock.patch.object(trainer, "plot_curve", lambda out: out / "undrawn"),
        mock.patch.object(trainer, "compile_step", compile_step),
        mock.patch.object(trainer, "fresh_state", fresh_state),
        mock.patch.object(setup, "require_fit", _kept(setup.require_fit)),
    ):
        yield


def run_here(
    *arguments: str | Path,
    module: str = "train_tpu.run",
    expect: int = 0,
    moment: str | None = None,
    then: Callable[[], None] = lambda: None,
    compile_anew: bool = False,
    drawn: bool = False,
) -> tuple[str, str]:
    """As `run`, in this process, which spares the imports. `then` is called when it has said `moment`.

    compile_anew: all of it, as in a new process; otherwise what an earlier run here compiled will do. drawn:
    with its loss curve.
    """
    main = importlib.import_module(module).main
    out, err = Said(moment, then), io.StringIO()
    if compile_anew:
        import jax

        jax.clear_caches()
    trains = module.startswith(("train_tpu.run", "train_tpu.replay", "train_tpu.finetune"))
    shared = trains and not compile_anew
    with (
        compiled_once(drawn) if shared else contextlib.nullcontext(),
        mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
        mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_command(main)
        except SystemExit as end:
            code = end.code
    said = f"{out.getvalue()[-2000:]}\n{err.getvalue()}"
    require(code == expect, f"exit code {code}, not {expect}:\n{said}")
    require(moment is None or out._moment is None, f"{moment!r} was not said:\n{said}")
    return out.getvalue(), err.getvalue()


def refusal_here(*arguments: str | Path, **kwargs) -> str:
    """As `refusal`, in this process."""
    return sentence(run_here(*arguments, expect=2, **kwargs)[1])


def start_two(
    cache: Path,
    *arguments: str | Path,
    second: tuple[str, ...] = (),
    environs: Sequence[dict] = ({}, {}),
    module: str = "train_tpu.run",
) -> list[subprocess.Popen]:
    """Both processes of one run, of two CPU devices each; `second` are further arguments of the second."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    several = ("--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id")
    return [
        start(cache, *arguments, *several, str(i), *more, devices=2, environ=environs[i], module=module)
        for i, more in enumerate(((), second))
    ]


def finish(processes: list[subprocess.Popen], timeout: int = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    done = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def refusal(cache: Path, *arguments: str | Path, **kwargs) -> str:
    """Runs a command that must refuse: exit code 2 and one sentence, no traceback. Gives the sentence."""
    return sentence(run(cache, *arguments, expect=2, **kwargs)[1])


def sentence(err: str) -> str:
    """The one line of stderr, which says what was refused."""
    lines = [line for line in err.splitlines() if line.strip()]
    require(len(lines) == 1 and lines[0].startswith("error: "), err)
    return lines[0]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every update a run logged, exactly as it had them."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(folder, "train")]
