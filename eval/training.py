"""Tasks during training: `train_tpu.run --eval-tasks`. Reads parameters and nothing else of the run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from core.config import ModelConfig
from core.errors import UserError
from core.model import Params
from core.tokenizer import Tokenizer
from eval.evaluate import evaluate_task
from eval.flax_backend import FlaxBackend
from eval.harness import HarnessModel, Interrupted
from eval.results import figures, shown
from eval.settings import task_names
from eval.tasks import open_tasks

Figures = list[tuple[str, float, str]]


class TaskEvaluator:
    """Evaluates the same tasks again and again, of the parameters it is given. A context manager."""

    def __init__(
        self,
        names: str,
        data_dir: Path | None,
        model: ModelConfig,
        dtype: Literal["float32", "bfloat16"],
        tokenizer: Tokenizer,
    ):
        """Opens the tasks and their data at once, so that a wrong name is told before the first step.

        names: with commas between.

        Raises:
            UserError: a task is unknown or its data is not to be had (see `eval.tasks`).
        """
        self.interrupted: Callable[[], bool] = lambda: False
        self._model, self._dtype, self._tokenizer = model, dtype, tokenizer
        self._backend: FlaxBackend | None = None
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
        self, params: Params, limit: int | None, say: Callable[[str], None]
    ) -> Iterator[tuple[str, int, Figures]]:
        """(task, questions, figures) of every task; less of them if it is interrupted on the way.

        A figure is a metric's name, its value and what is said of it. A task that cannot be evaluated does
        not end the training: it is told.

        limit: questions of each task; say: tells the user.
        """
        if self._backend is None:
            self._backend = FlaxBackend(self._model, params, self._dtype)
        self._backend.params = params
        harness = HarnessModel(
            self._backend, self._tokenizer, quiet=True, interrupted=lambda: self.interrupted()
        )
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
                yield task, entry["questions"], found
        self._backend.params = None  # the next step may reuse their memory
