"""`python -m eval.run MODEL --tasks ...`: lm-evaluation-harness's tasks on a checkpoint or exported folder.

main() reads in order: names and data, model, one task after the other, table and plot. Each finished task is
written at once; the same command resumes after it.
"""

import dataclasses
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import checks, cli
from core.errors import EXIT_INTERRUPTED, UserError, run_command
from core.hub_models import is_hub_name, local, origin
from eval.results import RESULTS, Record, Results, figures, hold_results, shown
from eval.settings import Device, is_checkpoint, require_model, task_names

DEFAULT_TASKS = "wikitext,arc_easy,arc_challenge,openbookqa,truthfulqa_mc2"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model on tasks of lm-evaluation-harness: its prompts, its choices, its metrics.

    A run or a checkpoint is evaluated with Flax, an exported folder (or any Llama's that fits) with PyTorch.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, one checkpoint in it, a folder that port_torch.convert wrote, or a model on the Hugging
    Face Hub, as hf:OWNER/NAME[@REVISION]."""
    tasks: str = DEFAULT_TASKS
    """Names of tasks, groups or tags of lm-eval, separated by commas."""
    data_dir: Path | None = None
    """A folder with the data of tasks (arc/, openbookqa/, truthfulqa/, wikitext-2-raw/, piqa/, winogrande/,
    lambada/, blimp/). Other tasks, and all without it, get theirs from the Hugging Face hub."""
    out: Path | None = None
    """Where the results go. Default: eval/step-N in the run, FOLDER-eval next to a folder or a checkpoint in
    no run, or here NAME-eval."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. float32 is exact on every device; bfloat16 is faster on a GPU or TPU."""
    device: Device = "auto"
    """For exported folders. auto: all GPUs if there are any. Checkpoints run where JAX runs."""
    tokenizer: str | None = None
    """The model's tokenizer.json, where neither the run or folder nor its old path has it."""
    shots: int | None = None
    """Solved examples before each question, from the task's training documents. Default: as the task says."""
    limit: int | None = None
    """Only the first questions of each task, for a quick try; the table says so."""
    card: bool = False
    """Also write the results into the model card of the exported folder (README.md)."""

    def __post_init__(self) -> None:
        checks.counts(0, shots=self.shots)
        checks.counts(limit=self.limit)


def main() -> int:
    """The command; 130 when Ctrl-C cut it short, after what was done is written."""
    config = cli.parse(EvalConfig, prog="python -m eval.run")
    names = task_names(config.tasks)
    require_model(config.model, config.device)
    if config.card and (is_hub_name(config.model) or origin(config.model)):
        raise UserError(f"--card: {config.model} is in the Hub's cache; give a folder of your own")
    config = dataclasses.replace(config, model=local(config.model))
    if config.card:
        if is_checkpoint(config.model):
            raise UserError(
                f"--card: {config.model} is a checkpoint; convert it first and evaluate the folder"
            )
        from eval.card import check_card, update_card

        check_card(config.model)
    # Slow: JAX and lm-eval with the datasets of Hugging Face.
    from eval.evaluate import BOOTSTRAP, evaluate_task
    from eval.harness import HarnessModel
    from eval.models import describe, open_model
    from eval.tasks import FEWSHOT_SEED, open_tasks

    with open_tasks(names, config.data_dir) as tasks:
        model = open_model(config.model, config.dtype, config.device, config.tokenizer)
        settings = {
            "backend": model.identity["kind"], "dtype": config.dtype, "shots": config.shots,
            "limit": config.limit, "fewshot_seed": FEWSHOT_SEED, "bootstrap": BOOTSTRAP, "bos": True,
            "lm_eval": metadata.version("lm_eval"),
        }  # fmt: skip
        folder = config.out or model.results
        with hold_results(folder, RESULTS, model.identity):
            results = Results(folder, model.identity, settings)
            print(describe(model, config.dtype))
            harness = HarnessModel(model.backend, model.tokenizer)
            try:
                for name in tasks.names:
                    if results.has(name, tasks.files):
                        print(f"{name}: already evaluated, in {folder}")
                        continue
                    record, questions = evaluate_task(harness, tasks, name, config.shots, config.limit)
                    results.add(name, record, questions)
                    report(name, record, model.backend.context)
            except KeyboardInterrupt:
                print(
                    f"interrupted: finished tasks are in {folder}; the same command resumes", file=sys.stderr
                )
                return EXIT_INTERRUPTED
            results.finish()
    if config.card:
        update_card(config.model, results.content)
        print(f"wrote the results into {config.model / 'README.md'}")
    print(f"wrote {folder}/: results.json, results.md, results.png, questions/")
    return 0


def report(name: str, record: Record, context: int) -> None:
    """Says what came out of a task or group, and what was cut off."""
    for task, entry in record["tasks"].items():
        texts = [f"{metric} {shown(metric, value, stderr)}" for metric, value, stderr in figures(entry)]
        n, seconds = entry["questions"], record["seconds"]
        print(f"{task}: {', '.join(texts)} ({n:,} questions, {seconds:.0f} s)")
    for group, entry in record["groups"].items():
        texts = [f"{metric} {shown(metric, value, stderr)}" for metric, value, stderr in figures(entry)]
        print(f"{group}: {', '.join(texts)} (the group)")
    if record["truncated"]:
        print(
            f"{name}: {record['truncated']} requests were longer than the context of {context} tokens and "
            "lost their beginning, as the harness does",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)
