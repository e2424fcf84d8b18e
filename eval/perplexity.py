"""`python -m eval.perplexity MODEL`: the perplexities of a text, each under a name that says what it is.

The same model has several on the same text, which people compare with each other by mistake:

    token_disjoint   exp(nats per token): the text as it is, in adjacent windows of the context
    token_stride     the same with overlapping windows, as Hugging Face's guide has it: every token but those
                     of the first window sees at least context - stride tokens before it
    word             exp(nats / words), words as lm-evaluation-harness counts them; WikiText by its pages,
                     detokenized, and everything else as one document
    byte             bits per byte: of each of these; the only one that compares between tokenizers

The text begins with `<s>` (`</s>` with a tokenizer that has none), which the per-token numbers do not score;
lm-evaluation-harness does (see eval.harness).
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from core import checks, cli
from core.data.text import read_text
from core.errors import UserError, run_command
from core.folders import write_atomically
from core.hub_models import local
from core.progress import Activity
from core.tokenizer import Tokenizer
from eval.batching import Backend, Row, score_rows
from eval.hub import go_offline_if_unreachable
from eval.local_data import WIKITEXT_TEST
from eval.results import PERPLEXITIES, hold_results, read_perplexities, table, versions
from eval.settings import Device, require_model

if TYPE_CHECKING:
    from eval.harness import HarnessModel

# wiki.test.raw of wikitext-2-raw-v1 as published, with \n for line ends.
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Perplexities of WikiText-2's test text, or of your own text: per token, per word, and bits per byte."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, one checkpoint in it, a folder that port_torch.convert wrote, or a model on the Hugging
    Face Hub, as hf:OWNER/NAME[@REVISION]."""
    text: Path | None = None
    """A text file (UTF-8, also .gz, .bz2, .xz or .zst) instead of WikiText-2."""
    data_dir: Path | None = None
    """Folder with wikitext-2-raw/wiki.test.raw. Default: downloaded from the Hugging Face Hub."""
    stride: int | None = None
    """Tokens from one overlapping window to the next. Default: 512, or half of a context below 1024."""
    out: Path | None = None
    """Where perplexity.json goes. Default: eval/step-N in the run, FOLDER-eval next to a folder or a
    checkpoint in no run, or here NAME-eval."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. float32 is exact on every device; bfloat16 is faster on a GPU or TPU."""
    device: Device = "auto"
    """For exported folders. auto: all GPUs if there are any. Checkpoints run where JAX runs."""
    tokenizer: str | None = None
    """The model's tokenizer.json, where neither the run or folder nor its old path has it."""

    def __post_init__(self) -> None:
        checks.counts(stride=self.stride)


class TokenScore(NamedTuple):
    """A text's tokens scored once each."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return exp(self.nats / self.tokens)


def disjoint_rows(ids: list[int], context: int) -> Iterator[Row]:
    """Windows side by side, as in training: every id but the first is scored once."""
    for start in range(0, len(ids) - 1, context):
        targets = ids[start + 1 : start + 1 + context]
        yield Row(ids[start : start + len(targets)], targets)


def stride_rows(ids: list[int], context: int, stride: int) -> Iterator[Row]:
    """Windows of `context` ids that begin every `stride`; each scores what the one before did not.

    https://huggingface.co/docs/transformers/perplexity: the window's first id is never scored, so a window of
    `context` ids has `context - 1` predictions.
    """
    scored_to = 1  # ids before this one are scored, or are the first
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        targets = ids[scored_to:end]
        if targets:
            yield Row(ids[start : end - 1], targets)
        scored_to = end
        if end == len(ids):
            return


def score_text(backend: Backend, rows: list[Row], what: str) -> TokenScore:
    """The rows' targets, scored."""
    with Activity(f"scoring {what}", sum(len(row.inputs) for row in rows), "tokens") as progress:
        logprobs, _ = score_rows(backend, rows, progress.advance)
    return TokenScore(-float(logprobs.sum()), sum(len(row.targets) for row in rows))


def exp(mean: float) -> float:
    """e^mean, infinity where a float cannot hold it."""
    return math.exp(mean) if mean < 700 else math.inf


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them for WikiText."""
    return len(re.split(r"\s+", text))


def measure(
    backend: Backend, tokenizer: Tokenizer, text: str, stride: int
) -> dict[str, dict[str, float | int]]:
    """The per-token perplexities of a text and what they are made of, by name; a UserError if it is empty."""
    ids = [tokenizer.prefix, *tokenizer.encode(text).tolist()]
    n_bytes = len(text.encode())
    context = backend.context
    if len(ids) < 2:
        raise UserError("the text is empty: there is nothing to score")
    scores = {
        "token_disjoint": score_text(backend, list(disjoint_rows(ids, context)), "token_disjoint"),
        "token_stride": score_text(backend, list(stride_rows(ids, context, stride)), "token_stride"),
    }
    return {
        name: {
            "perplexity": score.perplexity,
            "nats": score.nats,
            "tokens": score.tokens,
            "bytes": n_bytes,
            "bits_per_byte": score.nats / math.log(2) / n_bytes,
        }
        for name, score in scores.items()
    }


def measure_words(harness: "HarnessModel", text: str) -> dict[str, float | int]:
    """The per-word perplexity of a text as one document, by the harness's rolling windows."""
    from lm_eval.api.instance import Instance  # slow, as all of lm-eval

    harness.task = "word"
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (logprob,) = harness.loglikelihood_rolling([request])
    return _words(-logprob, harness.bos_nats, count_words(text), len(text.encode()))


def measure_wikitext_words(harness: "HarnessModel", data_dir: Path | None) -> dict[str, float | int]:
    """The harness's task `wikitext`: pages, detokenized, words and bytes of the original."""
    from eval.evaluate import evaluate_task  # slow, as all of lm-eval
    from eval.tasks import open_tasks

    with open_tasks(["wikitext"], data_dir) as tasks:
        record, questions = evaluate_task(harness, tasks, "wikitext")
    entry = record["tasks"]["wikitext"]
    nats = -sum(row["logprob"] for row in questions["wikitext"])
    return _words(nats, entry["bos_nats"], entry["words"], entry["bytes"])


def _words(nats: float, bos_nats: float, n_words: int, n_bytes: int) -> dict[str, float | int]:
    return {
        "perplexity": exp(nats / n_words),
        "perplexity_without_bos": exp((nats - bos_nats) / n_words),
        "nats": nats,
        "bos_nats": bos_nats,
        "words": n_words,
        "bytes": n_bytes,
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


def wikitext_test(data_dir: Path | None) -> str:
    """WikiText-2's raw test text; a UserError where it is not to be had, or its hash is another."""
    if data_dir is not None:
        text, where = read_text(data_dir / WIKITEXT_TEST), str(data_dir / WIKITEXT_TEST)
    else:
        import datasets

        go_offline_if_unreachable()
        where = "Salesforce/wikitext, wikitext-2-raw-v1"
        try:
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
        except OSError as error:
            raise UserError(
                f"WikiText-2 is not on this machine, and the Hugging Face hub cannot be reached ({error}): "
                f"give --data-dir with {WIKITEXT_TEST}, or --text FILE"
            ) from None
        text = "".join(row or " \n" for row in rows)  # the hub has "" for an empty line, which is a space
    if hashlib.sha256(text.encode()).hexdigest() != WIKITEXT_SHA256:
        raise UserError(f"{where} is not the raw test text of WikiText-2 as published: its sha256 differs")
    return text


def main() -> int:
    """The command."""
    config = cli.parse(PerplexityConfig, prog="python -m eval.perplexity")
    if config.text and config.data_dir:
        raise UserError("give --text or --data-dir, not both")
    require_model(config.model, config.device)
    text = read_text(config.text) if config.text else wikitext_test(config.data_dir)
    from eval.harness import HarnessModel  # slow: JAX and lm-eval
    from eval.models import describe, open_model

    model = open_model(local(config.model), config.dtype, config.device, config.tokenizer)
    context = model.backend.context
    stride = min(512, context // 2) if config.stride is None else config.stride
    if stride >= context:
        raise UserError(f"--stride is {stride}; it must be less than the context, {context}")
    folder = config.out or model.results
    with hold_results(folder, PERPLEXITIES, model.identity):
        print(describe(model, config.dtype))
        harness = HarnessModel(model.backend, model.tokenizer)
        found: dict[str, Any] = dict(measure(model.backend, model.tokenizer, text, stride))
        if config.text:
            found["word"] = measure_words(harness, text)
        else:
            found["word"] = measure_wikitext_words(harness, config.data_dir)
        name = config.text.name if config.text else "WikiText-2 test, raw"
        first = "bos" if model.tokenizer.bos is not None else "eos"
        print(report(name, found, model.backend.context, stride, first))
        there, path = read_perplexities(folder), folder / PERPLEXITIES
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if name in there and there[name]["sha256"] != sha256:
            print(
                f"note: {path} had the perplexities of another text named {name}, which are replaced",
                file=sys.stderr,
            )
        there[name] = {
            "model": model.identity,
            "settings": {"dtype": config.dtype, "stride": stride, "context": context},
            "sha256": sha256,
            "versions": versions(),
            "perplexities": found,
        }
        write_atomically(path, json.dumps(there, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def report(name: str, found: dict[str, dict[str, float | int]], context: int, stride: int, first: str) -> str:
    """The table that is printed. first: the token that opens a text, bos, or eos where there is none."""
    begins = f"the text begins with {first}, not scored"
    how = {
        "token_disjoint": f"per token; adjacent windows of {context}; {begins}",
        "token_stride": f"per token; Hugging Face's windows, stride {stride}; {begins}",
        "word": "per word, as lm-evaluation-harness"
        + ("; bos scored once per document" if first == "bos" else ""),
    }
    rows = []
    for kind, values in found.items():
        units = values.get("tokens", values.get("words"))
        rows.append((
            kind, f"{values['perplexity']:.3f}", f"{values['bits_per_byte']:.4f}", f"{units:,}", how[kind],
        ))  # fmt: skip
    lines = [f"{name} ({found['token_disjoint']['bytes']:,} bytes)"]
    lines.append(table(("name", "perplexity", "bits per byte", "units", "how"), rows))
    if first == "bos":
        lines.append(f"word without scoring bos: {found['word']['perplexity_without_bos']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
