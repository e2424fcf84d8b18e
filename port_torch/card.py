"""README.md of an exported folder: the model card, from what the manifest and the run's log know."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from core.checkpoint.manifest import CHANGE, Manifest
from core.checkpoint.steps import run_folder
from core.config import ModelConfig
from core.data.mixture import describe_phases, phases_of
from core.hub_models import PREFIX, parse_hub_name
from core.run.log import read_log
from core.tokenizer import Tokenizer
from core.tokenizer_json import as_library
from port_torch.folder import EXPORT_FORMAT
from port_torch.hf_config import STOCK, stock_type
from port_torch.tuned import converses, tuned_in, tuning

LICENSE = "mit"
POSITIONS = {"rope": "rotary (half-split)", "learned": "a learned table"}
UNTUNED = "It continues text; it is not tuned to follow instructions."
TOLD = ("rows", "form", "template", "trained", "example")  # of the tuning, in a table of their own
ENDS = "What it says ends with `{}`, at which `generate` stops."
METRICS = {"bits_per_byte": "bits per byte", "nll": "nats per token", "perplexity": "perplexity"}


def model_card(
    name: str,
    model: ModelConfig,
    manifest: Manifest,
    held_out: list[dict[str, Any]],
    tokenizer: Tokenizer,
) -> str:
    """The text of the card.

    Args:
        name: of the model, for its title.
        manifest: of the checkpoint; its counters, data and lineage are told.
        held_out: what `held_out_scores` gives.
        tokenizer: of the model.
    """
    tuned, library = tuning(manifest), as_library(tokenizer)
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="held-out",
            dataset_name=row["split"], dataset_config=row["split"],  # sets of one type and config are merged
            metric_type=metric, metric_name=METRICS[metric], metric_value=row[metric],
        )
        for row in held_out for metric in METRICS
    ]  # fmt: skip
    base, imported = base_model(manifest), imported_from(manifest)
    made = "trained from scratch with MTLM."
    if base:
        made = f"made with MTLM from [{base}](https://huggingface.co/{base}), whose license applies."
    elif imported:
        made = f"made with MTLM from weights that were imported (`{imported}`), whose license applies."
    data = ModelCardData(
        license=LICENSE if is_ours(manifest) else None,
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mtlm"],
        model_name=name,
        eval_results=results or None,
    )
    lines = [
        f"# {name}",
        f"A small language model {made} {tuned.what if tuned else UNTUNED} "
        "What it says may be wrong or offensive.",
        "## Use",
        _usage(model, manifest, tokenizer, tuned.prompt if tuned else "This function returns"),
        *([f"{tuned.format} {ENDS.format(library.id_to_token(tokenizer.eos))}".strip()] if tuned else []),
        "## Model",
        _table(_model_rows(model)),
        "## Training",
        _table(_training_rows(manifest)),
    ]
    if manifest.lineage:
        steps = "\n".join(f"{i}. {_entry(entry)}" for i, entry in enumerate(manifest.lineage, 1))
        lines += ["What its parameters come from, oldest first:", steps]
    if held_out:
        lines += ["## Evaluation", _table(_evaluation_rows(held_out), header=("held-out", *METRICS.values()))]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def base_model(manifest: Manifest) -> str | None:
    """The model of the Hugging Face Hub, OWNER/NAME, that the parameters come from."""
    published = [entry["path"] for entry in manifest.lineage if entry.get("path", "").startswith(PREFIX)]
    return parse_hub_name(Path(published[-1])).repository if published else None


def imported_from(manifest: Manifest) -> str | None:
    """What others made of which the parameters come from, as it may be published; None: nothing."""
    imports = [entry for entry in manifest.lineage if entry["operation"] == "import"]
    foreign = [entry["path"] for entry in imports if entry.get("format") != EXPORT_FORMAT]
    return shown_path(foreign[-1]) if foreign else None


def is_ours(manifest: Manifest) -> bool:
    """Whether MTLM trained the parameters from random ones, so that its license applies."""
    return base_model(manifest) is None and imported_from(manifest) is None


def held_out_scores(step_dir: Path, step: int) -> list[dict[str, Any]]:
    """The last evaluation of every held-out set at `step`, from the log of the run that saved `step_dir`."""
    rows = read_log(run_folder(step_dir), "eval")
    scores = {row["split"]: row for row in rows if row["step"] == step}
    return [row for row in scores.values() if all(isinstance(row.get(metric), float) for metric in METRICS)]


def _usage(model: ModelConfig, manifest: Manifest, tokenizer: Tokenizer, prompt: str) -> str:
    stock = stock_type(model)
    trust = "" if stock else ", trust_remote_code=True"
    why = (
        ""
        if stock
        else (
            "\nThe model's code is in this folder: `modeling_mtlm.py`. The tokenizer runs none of it; "
            "`AutoTokenizer` opens the model's configuration first, and `PreTrainedTokenizerFast` does not.\n"
        )
    )
    # transformers 5 opens the tokenizer of every Qwen2 folder as Qwen2's own.
    opener = "PreTrainedTokenizerFast" if stock == "qwen2" else "AutoTokenizer"
    bos = "nothing" if tokenizer.bos is None else f"`{as_library(tokenizer).id_to_token(tokenizer.bos)}`"
    encoded = f'tokenizer({json.dumps(prompt)}, return_tensors="pt")'
    read = "; special tokens that a text spells are text"
    if converses(manifest):
        said = f'[{{"role": "user", "content": {json.dumps(prompt)}}}]'
        encoded = (
            f"tokenizer.apply_chat_template(\n    {said}, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt"\n)'
        )
        read = ""
    return f"""```python
from transformers import AutoModelForCausalLM, {opener}

tokenizer = {opener}.from_pretrained(FOLDER{trust})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
inputs = {encoded}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{why}
The tokenizer puts {bos} before a text, as every document in training had
it{read}."""


def _model_rows(model: ModelConfig) -> Iterator[tuple[str, str]]:
    c = model
    stock = stock_type(c)
    yield "architecture", STOCK[stock] if stock else "MTLM decoder"
    yield "parameters", f"{c.n_params:,} ({c.n_params - c.n_embedding_params:,} without embeddings)"
    yield "layers, width, heads", f"{c.n_layers}, {c.d_model}, {c.n_heads}"
    if c.kv_heads != c.n_heads:
        yield "heads of keys and values", str(c.kv_heads)
    if c.q_width != c.d_model:
        yield "head size", str(c.head_size)
    if c.qk_norm:
        yield "norms", "of queries and keys, too"
    yield "MLP", f"{c.mlp}, {c.d_mlp} wide"
    yield "positions", POSITIONS[c.positions] + (f", scaled: {c.rope_scaling}" if c.rope else "")
    qkv = "of queries, keys and values" if c.qkv_biases else "none"
    yield "biases", "in attention and MLP" if c.biases else qkv
    yield "output head", "the embedding table" if c.tied else "its own"
    yield "context", f"{c.context} tokens"
    yield "vocabulary", f"{c.vocab_size:,} ids"


def _training_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    run = manifest.config.get("run", {})
    if tuned := tuned_in(manifest):
        yield "fine-tuned from", shown_path(tuned["path"])
        for name in TOLD:
            if name in tuned:
                yield name, tuned[name]
    later = ", not counting the run that its parameters come from" if manifest.took_parameters else ""
    yield "updates", f"{manifest.step:,}{later}"
    yield "sequences", f"{manifest.sequences:,}"
    yield "tokens", f"{manifest.tokens:,}{later}"
    if manifest.data:
        # Of a path only its end: the rest says where someone keeps their files.
        given = run.get("data")
        name = f"{Path(given).name}, " if isinstance(given, str) else ""
        yield "data", f"{name}fingerprint `{manifest.data['fingerprint'][:16]}`"
        if phases := phases_of(manifest.data):
            yield "mixture", describe_phases(phases)
    tokenizer = manifest.tokenizer
    yield "tokenizer", f"{Path(tokenizer['name']).name}, sha256 `{tokenizer['sha256'][:16]}`"
    for setting in ("optimizer", "lr", "batch", "seed"):
        if setting in run:
            yield setting, str(run[setting])
    versions = {name: version for name, version in manifest.code.items() if version}
    yield "code", ", ".join(f"{name} {version}" for name, version in versions.items())


def _evaluation_rows(held_out: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in held_out:
        yield row["split"], *(f"{row[metric]:.4g}" for metric in METRICS)


def _entry(entry: dict[str, Any]) -> str:
    """One entry of the lineage, with paths cut to their last part; the manifest has all of it."""
    shown = {name: value for name, value in entry.items() if name not in TOLD}
    if "path" in entry:
        shown["path"] = shown_path(entry["path"])
    operation = shown.pop("operation", "unknown")
    if operation == CHANGE:
        return f"{shown['to']} continued at step {shown['step']:,} what {shown['from']} had trained"
    if operation == "grow":
        before, after = shown["layers"]
        return (
            f"grow: {shown['plan']} from {before} to {after} layers at step {shown['step']:,}, "
            f"{shown['tokens']:,} tokens; optimizer {shown['optimizer']}, schedule {shown['schedule']}"
        )
    return f"{operation}: {', '.join(f'{key} {value}' for key, value in shown.items())}"


def shown_path(path: str) -> str:
    """A path that may be published: of a local one its end, of a run's checkpoint the run as well."""
    if path.startswith((PREFIX, "tfds:")):
        return path
    *_, run, folder, name = ("", "", *Path(path).parts)
    return f"{run}/{folder}/{name}" if folder == "checkpoints" and run else name


def _table(rows: Iterator[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    lines = [header, ("---",) * len(header), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text in a table: on one line, and without ending its cell."""
    return (text if text.isprintable() else json.dumps(text, ensure_ascii=False)).replace("|", r"\|")
