"""The data of a run: its sources opened, and from which sequence on which mixture of them holds.

A phase of a mixture is given as a part of the run. When the run begins it becomes the index of a sequence,
which config.json and the manifests record: whatever --steps or --batch a later start has, it stays there. A
mixture that is changed at a resume is a new phase, which begins at the next sequence.
"""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from core.cache import CACHE
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import list_steps, step_path
from core.data.batches import Data
from core.data.dataset import TRAIN, Dataset, Split, open_dataset
from core.data.mixture import BLOCK, Mixture, Phase, describe_phases, phases_of
from core.data.mixture_options import Asked, data_paths, parse_data, parse_mixture
from core.data.prepare import choose_tokenizer, is_prepared, open_or_prepare
from core.data.sources import names_data_set
from core.data.sources import open_sources as find_text
from core.errors import UserError
from core.run.folder import begun_record, newest_manifest
from core.run.presets import Trained, count_steps
from core.run.settings import current_names
from core.tokenizer import Tokenizer, require_same


def choose_run_tokenizer(config: Any, default: str) -> Tokenizer:
    """The tokenizer that the user names, else that of prepared data, else the one named `default`.

    Raises:
        UserError: sources were prepared with different ones, or for different contexts.
    """
    data = parse_data(config.data)
    if isinstance(data, str):
        return choose_tokenizer(config.tokenizer, data, default)
    prepared = {name: open_dataset(path) for name, path in data.items() if is_prepared(path)}
    (first, one), *others = prepared.items() or [(None, None)]
    for name, other in others:
        what = f"the source {first}", f"the source {name}"
        require_same(one.tokenizer_record, other.tokenizer_record, *what)
        if one.context != other.context:
            raise UserError(
                f"the source {first} was prepared for a context of {one.context} and {name} for "
                f"{other.context}: prepare one of them again with the other's --context"
            )
    path = data[first] if prepared else next(iter(data.values()))
    return choose_tokenizer(config.tokenizer, path, default)


def open_data(config: Any, tokenizer: str, context: int, out: Path) -> Data:
    """The data that a run in the folder `out` reads; text is prepared.

    Raises:
        UserError: a source cannot be opened or holds no window, or a phase does not fit the run.
    """
    asked = parse_mixture(config.data, config.weights, config.phases)
    old = None if "data" in config.allow_change else begun_record(out)
    wanted = fingerprints_of(old["data"]) if old else set()
    if asked is None:
        return open_or_prepare(config.data, tokenizer, context, CACHE, wanted)
    sources = open_sources(asked.sources, tokenizer, context, wanted)
    return Mixture(sources, find_phases(config, asked, sources, out))


def is_ready(data: str | Sequence[str]) -> bool:
    """Whether all that --data names is prepared, so that it opens at once.

    Raises:
        UserError: there is no such text on this machine. Data sets are not looked for.
    """
    texts = [path for path in data_paths(data) if not is_prepared(path)]
    for text in texts:
        if text != "builtin" and not names_data_set(text):
            find_text([text], say=lambda _: None)
    return not texts


def open_recorded_data(
    data: str | Sequence[str], record: dict[str, Any], tokenizer: str, context: int
) -> Data:
    """The data of a recorded run, as it was mixed then.

    Args:
        data: where it is, as --data names it.
        record: what config.json or a manifest says of it.
    """
    sources = parse_data(data)
    if isinstance(sources, str):
        return open_or_prepare(sources, tokenizer, context, CACHE, fingerprints_of(record))
    if "mixture" not in record:
        path = next(iter(sources.values()))
        raise UserError(f"the run was trained on one source without a name: give it so, --data {path}")
    return Mixture(open_sources(sources, tokenizer, context, fingerprints_of(record)), phases_of(record))


def fingerprints_of(record: dict[str, Any]) -> set[str]:
    """Of all data that a run reads: of folders that were appended to, it gets the versions that these are of.

    record: what config.json or a manifest says of it.
    """
    return {record["fingerprint"], *record.get("mixture", {}).get("sources", {}).values()}


def open_sources(
    sources: dict[str, str], tokenizer: str, context: int, wanted: Collection[str]
) -> dict[str, Dataset]:
    """The sources of a mixture, prepared folders or text, by name; in the version that is wanted, if any."""
    found = {}
    for name, path in sources.items():
        try:
            found[name] = open_or_prepare(path, tokenizer, context, CACHE, wanted)
        except UserError as error:
            raise UserError(f"the source {name}: {error}") from None
        if found[name].splits[TRAIN].windows < 1:
            raise UserError(
                f"the source {name}: the text of {path} does not fill one window of {context} tokens: give "
                "more text or a shorter --context"
            )
    return found


def find_phases(config: Any, asked: Asked, sources: dict[str, Dataset], out: Path) -> tuple[Phase, ...]:
    """From which sequence on which mixture holds: what is recorded, if the same is asked for, else from where
    the run in `out` resumes, or from its beginning."""
    old = begun_record(out)
    if old and (recorded := as_recorded(old, asked)):
        return recorded
    start = resumed_manifest(config, out) if old else None
    kept: tuple[Phase, ...] = ()
    before = trained(start)
    step, sequences = before.step, before.sequences
    if start:
        if config.fallback:
            raise UserError(
                "--fallback may resume from an older step than the newest, where the mixture would change: "
                "resume without the change first"
            )
        kept = tuple(phase for phase in phases_before(old["data"], sources) if phase.first < sequences)
    steps = count_steps(config, Mixture(sources, ()), before)
    phases = []
    for share, counts in asked.shares:
        begins = 0 if share == 0 else round(share * steps)
        if share > 0 and not (0 < begins < steps and begins > phases[-1][0]):
            raise UserError(
                f"--phases {share:g} would begin at update {begins} of {steps}, where another one begins or "
                "the run ends: give phases that are farther apart, or more steps"
            )
        phases.append((begins, counts))
    now = [counts for begins, counts in phases if begins <= step][-1]
    if not (kept and kept[-1].counts == now):
        kept = (*kept, Phase(sequences, now))
    later = ((begins - step, counts) for begins, counts in phases if begins > step)
    found = (*kept, *(Phase(sequences + n * config.batch, counts) for n, counts in later))
    if old and found == phases_of(old["data"]) and sources.keys() == old["data"]["mixture"]["sources"].keys():
        raise UserError(
            f"--weights and --phases differ from the run's only before update {step:,}, which has been "
            f"trained; from there on nothing would change ({found[-1]}): leave them as they were, or give "
            "what is to hold from there on"
        )
    return found


def as_recorded(old: dict[str, Any], asked: Asked) -> tuple[Phase, ...] | None:
    """The phases that a run's config.json records, if it was started with the mixture that is asked for."""
    recorded, run = old["data"].get("mixture"), current_names(old["run"])
    if recorded is None or recorded["sources"].keys() != asked.sources.keys():
        return None
    before = parse_mixture(run["data"], run["weights"], run["phases"])
    return phases_of(old["data"]) if before and before.shares == asked.shares else None


def phases_before(record: dict[str, Any], sources: dict[str, Dataset]) -> tuple[Phase, ...]:
    """Those of the data that a run has read so far; data without a name may have one now."""
    if "mixture" in record:
        return phases_of(record)
    same = [name for name, source in sources.items() if source.fingerprint == record["fingerprint"]]
    return (Phase(0, ((same[0], BLOCK),)),) if same else ()


def resumed_manifest(config: Any, out: Path) -> Manifest | None:
    """The manifest of the checkpoint that a run resumes from; None where there is none."""
    checkpoints = out / "checkpoints"
    if config.from_step in list_steps(checkpoints):
        return load_manifest(step_path(checkpoints, config.from_step))
    return newest_manifest(out)


def trained_before(config: Any, out: Path) -> Trained:
    """What the run in `out` has been trained on where it continues: nothing, if it begins."""
    return trained(resumed_manifest(config, out))


def trained(manifest: Manifest | None) -> Trained:
    """What the parameters of a run's checkpoint have been trained on."""
    return Trained(manifest.step, manifest.sequences) if manifest else Trained()


def data_rows(config: Any, data: Data, read: int) -> list[tuple[str, str]]:
    """What the table that a run begins with says of its data, and of how often each source will be read.

    read: sequences that the run will have read at its end.
    """
    heldout = ", ".join(f"{name} ({data.splits[name].bytes:,} bytes)" for name in data.heldout) or "none"
    rows = [] if isinstance(data, Dataset) else mixture_rows(config, data, read)
    name = config.data if isinstance(data, Dataset) else f"{len(data.sources)} sources"
    return [("data", f"{name}: {_size(data.splits[TRAIN])}"), *rows, ("held-out", heldout)]


def mixture_rows(config: Any, mixture: Mixture, end: int) -> list[tuple[str, str]]:
    """The sources, with their epochs, and the phases."""
    paths, rows, read = parse_data(config.data), [], mixture.read_before(end, config.seed)
    for name, source in mixture.sources.items():
        n = source.splits[TRAIN].windows
        epochs = f"{read[name] / n:.2f} epochs"
        if (at := mixture.used_up(name, config.seed, end)) is not None:
            epochs += f", used up at sequence {at:,} and then read again"
        rows.append((f"  {name}", f"{paths[name]}: {_size(source.splits[TRAIN])}; {epochs}"))
    return [*rows, ("mixture", describe_phases(mixture.phases, end)), *_same_text(mixture)]


def _same_text(mixture: Mixture) -> list[tuple[str, str]]:
    """Sources that were made of the same files, of which one holds text out: nobody compares their texts."""
    rows = []
    for (one, first), (other, second) in itertools.combinations(mixture.sources.items(), 2):
        both = [name for name in first.sources if name in second.sources]
        if both and (first.heldout or second.heldout):
            files = both[0] if len(both) == 1 else f"{both[0]} and {len(both) - 1:,} more"
            said = f"{one} and {other} were both made of {files}: what one holds out may train in the other"
            rows.append(("same text", f"{said}, and its held-out loss then looks too low"))
    return rows


def _size(split: Split) -> str:
    each = f"{split.bytes / split.tokens:.2f} bytes per token"
    return f"{split.tokens:,} tokens in {split.documents:,} documents, {each}"
