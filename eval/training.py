"""Tasks during training (`--eval-tasks`). Reads the weights and nothing else of a run."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from core.config import ModelConfig
from core.errors import UserError
from core.model import Params
from core.run.engine import TaskScore
from core.tokenizer import Tokenizer
from eval.batching import Backend
from eval.evaluate import evaluate_task
from eval.harness import HarnessModel, Interrupted
from eval.results import figures, shown
from eval.settings import task_names
from eval.tasks import open_tasks

OpenBackend = Callable[[Any], AbstractContextManager[Backend]]
"""Makes what scores out of the weights that an engine has; it holds them no longer than it is entered."""


class TaskEvaluator:
    """Evaluates the same tasks again and again, of the models it is given. A context manager."""

    def __init__(self, names: str, data_dir: Path | None, tokenizer: Tokenizer, open_backend: OpenBackend):
        """Opens the tasks and their data at once, so that a wrong name is told before the first step.

        names: with commas between; open_backend: `flax_backend(...)` or `torch_backend`.

        Raises:
            UserError: a task is unknown or its data is not to be had (see `eval.tasks`).
        """
        self._tokenizer, self._open_backend = tokenizer, open_backend
        self._stack = contextlib.ExitStack()
        with self._stack:
            self._tasks = self._stack.enter_context(open_tasks(task_names(names), data_dir))
            for name in self._tasks.names:
                self._tasks.load(name, None)
            self._stack = self._stack.pop_all()  # all is well: what is open stays open until the end

    def __enter__(self) -> "TaskEvaluator":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def evaluate(
        self, weights: Any, limit: int | None, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Iterator[TaskScore]:
        """Scores every task; less of them if it is stopped on the way.

        A task that cannot be evaluated does not end the training: it is told.

        weights: what `open_backend` takes; limit: questions of each task; say: tells the user.
        """
        with self._open_backend(weights) as backend:
            harness = HarnessModel(backend, self._tokenizer, stop)
            for name in self._tasks.names:
                try:
                    record, _ = evaluate_task(harness, self._tasks, name, limit=limit)
                except Interrupted:
                    return
                except UserError as error:
                    say(f"{name} was not evaluated: {error}")
                    continue
                for task, entry in record["tasks"].items():
                    found = [
                        (metric, value, f"{metric} {shown(metric, value, stderr)}")
                        for metric, value, stderr in figures(entry)
                    ]
                    yield TaskScore(task, entry["questions"], found)


def flax_backend(model: ModelConfig, dtype: Literal["float32", "bfloat16"]) -> OpenBackend:
    """Scores with parameters of core.model, in functions that are compiled once."""
    from eval.flax_backend import FlaxBackend

    made: list[FlaxBackend] = []

    @contextlib.contextmanager
    def hold(params: Params) -> Iterator[FlaxBackend]:
        if not made:
            made.append(FlaxBackend(model, params, dtype))
        made[0].params = params
        try:
            yield made[0]
        finally:
            made[0].params = None  # the next step may reuse their memory

    return hold


@contextlib.contextmanager
def torch_backend(decoder: Any) -> Iterator[Backend]:
    """Scores with the mirror that is trained, in float32."""
    from eval.torch_backend import TorchBackend

    yield TorchBackend([decoder.eval()])
