"""The data files of a dataset repository on the Hugging Face hub."""

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.data.data_files import TRAIN, Choice, File, choose, listed, report, split_of
from core.data.file_source import FileSource
from core.data.formats import FORMS, Form, format_of
from core.data.rows import RowText
from core.data.source import Source
from core.errors import UserError
from core.hub import require_reachable


class HubSource(Source):
    """The data files of a dataset repository on the Hugging Face hub, downloaded one by one."""

    def __init__(
        self, name: str, rows: RowText, form: Form | None, heldout: bool, say: Callable[[str], None]
    ) -> None:
        self.name, self._rows, self._form = name, rows, form
        self._dataset, _, config = name.removeprefix("hf:").partition(":")
        self._revision, choice = _choose_files(self._dataset, config, form, heldout)
        self._files = dict(sorted(choice.read))
        self.size = sum(self._files.values())
        if choice.left_out:
            say(report(name, choice))

    def identity(self) -> str:
        form = f" {self._form}" if self._form else ""
        files = " ".join(self._files)
        return f"hf {self._dataset} {self._revision} {files} {self._rows.identity}{form}"

    def documents(self) -> Iterator[tuple[str | None, int]]:
        before = 0
        for part in self.parts():
            for text, position in part.documents():
                yield text, before + position
            before += part.size

    def parts(self) -> list[Source]:
        return [_HubFile(self, file, size) for file, size in self._files.items()]


class _HubFile(Source):
    """One file of a repository, downloaded when it is read."""

    def __init__(self, repository: HubSource, file: str, size: int) -> None:
        self.name, self.size = f"{repository.name}/{file}", size
        self._at = repository._dataset, file, repository._revision
        self._rows, self._form = repository._rows, repository._form

    def identity(self) -> str:
        return f"hf {' '.join(self._at)} {self._rows.identity} {self._form}"

    def documents(self) -> Iterator[tuple[str | None, int]]:
        yield from FileSource(_hub_download(*self._at), self._rows, self._form).documents()


def _choose_files(dataset: str, config: str, form: Form | None, heldout: bool) -> tuple[str, Choice]:
    """The repository's commit, and which of its files are read.

    dataset: its name, such as `roneneldan/TinyStories`.
    config: one configuration by its name on the dataset's page (`sample-10BT`), a folder of the repository
    (`20231101.en`), a split (`validation`), or a glob (`*-train.txt`); empty for the whole repository.
    """
    import huggingface_hub

    require_reachable(f"hf:{dataset} is a dataset to be downloaded")
    try:
        info = huggingface_hub.HfApi().dataset_info(dataset, files_metadata=True)
    except Exception as error:  # httpx, offline mode, a missing or closed repository
        raise _unreachable(dataset, error) from error
    files = [File(f.rfilename, f.size or 0) for f in info.siblings or []]
    patterns = [config, *_config_patterns(info.card_data, config, heldout)] if config else []
    named = [
        file
        for file in files
        if (split_of(file.path) == config or any(fnmatch.fnmatchcase(file.path, p) for p in patterns))
        and (form or format_of(file.path).form)
    ]
    if named:
        return info.sha, Choice(named, {}, {})
    if config:
        files = [file for file in files if config in Path(file.path).parts[:-1]]
    choice = choose(files, heldout, form, published=True)
    if not choice.read:
        but = f", but {listed(choice.left_out)}" if choice.left_out else ""
        where = f"its configuration or folder {config!r}" if config else "it"
        raise UserError(
            f"the dataset {dataset} has no {', '.join(FORMS)} file in {where} to "
            f"{'hold out' if heldout else 'train on'}{but}: see its page for them"
        )
    return info.sha, choice


def _config_patterns(card: Any, config: str, heldout: bool) -> list[str]:
    """The patterns of paths that the head of a dataset's page gives for a configuration's train split, or for
    the others.

    There `data_files` is a pattern, a list of them, or a list of {split, path} with a pattern or a list each.
    """
    listed = (card.get("configs") if card else None) or []
    found = []
    for entry in listed:
        if entry.get("config_name") != config:
            continue
        given = entry.get("data_files") or []
        for files in [given] if isinstance(given, str) else given:
            if isinstance(files, dict):
                files = files.get("path") if (files.get("split") == TRAIN) != heldout else []
            found += [files] if isinstance(files, str) else files or []
    return found


def _hub_download(dataset: str, file: str, revision: str) -> Path:
    """The local path of one file, downloaded unless the hub's cache has it."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(dataset, file, repo_type="dataset", revision=revision))
    except Exception as error:
        raise _unreachable(f"{dataset}/{file}", error) from error


def _unreachable(what: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"could not download {what} from the Hugging Face Hub ({reason}): check the name and your "
        "connection, or pass local files"
    )
