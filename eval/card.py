"""Results in the model card of an exported folder: `model-index` and a section of the text.

The hub reads `model-index` from the front matter of README.md; huggingface_hub writes it.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from core.checkpoint.manifest import CARD
from core.errors import UserError
from core.folders import write_atomically
from eval.results import all_tasks, figures, protocol, shown, table

HEADING = "## Evaluation with lm-evaluation-harness"
COLUMNS = ("task", "metric", "value", "protocol")
BLANKS, LINE = r"[^\S\n]*", r".*(?:\n|\Z)"
HEADER = rf"{BLANKS}\|{BLANKS}".join(("", *COLUMNS, ""))
SECTION = re.compile(
    rf"^({HEADING}{BLANKS}(?:\n|\Z)(?:(?!#|{HEADER}){LINE})*)((?={HEADER})(?:{BLANKS}\|{LINE})*)?",
    re.MULTILINE,
)
"""The heading and what is written below it, up to the table or the next heading; then the table, if any."""


def check_card(folder: Path) -> ModelCard:
    """The folder's card; a UserError where there is none that can be read."""
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"--card: {path} is not there: export the model again for its card")
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())  # YAML's takes several lines
        raise UserError(f"--card: the front matter of {path} cannot be read: {why}") from None


def update_card(folder: Path, content: dict[str, Any]) -> None:
    """Writes the results into the card, in place of earlier ones; what else is written in it stays."""
    card = check_card(folder)
    tasks = all_tasks(content)
    data = card.data
    data.model_name = data.model_name or content["model"]["name"]
    kept = [result for result in data.eval_results or [] if result.dataset_type not in tasks]
    data.eval_results = kept + [
        EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=metric,
            metric_value=value, metric_name=f"{metric} ({protocol(entry)})",
        )
        for task, entry in tasks.items() for metric, value, _ in figures(entry)
    ]  # fmt: skip
    rows = [
        (task, metric, shown(metric, value, stderr), protocol(entry))
        for task, entry in tasks.items()
        for metric, value, stderr in figures(entry)
    ]
    results = table(COLUMNS, rows)

    def in_place(section: re.Match[str]) -> str:
        before, earlier = section.groups()
        end = "\n" if earlier else before[len(before.rstrip()) :] or "\n"
        return f"{before.rstrip()}\n\n{results}{end}"

    text, n_earlier = SECTION.subn(in_place, card.text)
    if not n_earlier:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n{results}\n"
    write_atomically(folder / CARD, f"---\n{data.to_yaml()}\n---\n{text}")
