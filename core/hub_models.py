"""Models by their names on the Hugging Face Hub, `hf:OWNER/NAME`: from its cache here, or downloaded into it.

Configuration, tokenizer and safetensors are downloaded and nothing else: no pickles, and no code, which would
not be run either. A download is pinned to a commit, which is said, and which `origin` gives for records.

The cache (docs: https://huggingface.co/docs/huggingface_hub/guides/manage-cache) holds every content once,
under its hash; a snapshot is a folder of links to contents:

    models--OWNER--NAME/refs/main                 the commit that a branch was at
    models--OWNER--NAME/snapshots/COMMIT/FILE  -> ../../blobs/HASH
    models--OWNER--NAME/blobs/HASH                a content, or -> ../../blobs/HA/HASH
    blobs/HA/HASH                                 a content that several models may share
"""

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError, os_error
from core.hub import require_reachable

PREFIX = "hf:"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LICENSE = "LICENSE"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What is downloaded beside config.json and weights; the last three lie in exports of ours.
OTHERS = (
    *TOKENIZERS, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "generation_config.json", "mtlm_manifest.json", "mtlm_tokenizer.json", LICENSE,
)  # fmt: skip
SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
PART = r"\w(?:[\w.-]*\w)?"
REPOSITORY = f"{PART}/{PART}"
NAME = re.compile(rf"{PREFIX}(?P<repository>{REPOSITORY})(?:@(?P<revision>\w[\w./+-]*))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
SHARED_HASH = re.compile("[0-9a-f]{64}")
MAIN = "main"
ANSWER = 10.0  # seconds that the Hub, which can be reached, may take to say what a model consists of


class HubName(NamedTuple):
    """A model's name on the Hub."""

    repository: str
    """OWNER/NAME."""
    revision: str
    """A branch, a tag or a commit."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + ("" if self.revision == MAIN else f"@{self.revision}")

    def page(self, folder: str = "") -> str:
        """The address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository}{folder}"


def is_hub_name(path: Path) -> bool:
    """Whether what was given for a folder is meant to be a name on the Hub."""
    return str(path).startswith(PREFIX)


def parse_hub_name(path: Path) -> HubName:
    """The name that a path is; a UserError where none can be like that."""
    found = NAME.fullmatch(str(path))
    if not found or "--" in found["repository"] or ".." in str(path):
        raise UserError(
            f"{str(path)!r} is no name on the Hugging Face Hub: give hf:OWNER/NAME, or "
            "hf:OWNER/NAME@REVISION for a branch, tag or commit"
        )
    return HubName(found["repository"], found["revision"] or MAIN)


def local(path: Path) -> Path:
    """The folder that a command was given, or the one of the model that it names on the Hub.

    The model is taken from the cache if it is whole there, and no one is asked whether there is a newer one.

    Raises:
        UserError: there is no such folder or model, it may not be read, its weights are not safetensors, or
            it is not in the cache and the Hub cannot be reached.
    """
    if is_hub_name(path):
        return _fetch(parse_hub_name(path))
    if not path.exists():
        raise UserError(
            f"{path} is not there: give a folder, or hf:OWNER/NAME for a model on the Hugging Face Hub"
        )
    return path


def pinned(path: Path) -> Path:
    """The path as the settings of a run record it: a name on the Hub with the commit that `local` opens."""
    folder = local(path)
    return Path(origin(folder) or path) if is_hub_name(path) else path


def origin(folder: Path) -> str | None:
    """The name and commit of a folder that is a snapshot in the cache, as hf:OWNER/NAME@COMMIT."""
    repository = _repository_of(folder)
    if repository is None:
        return None
    name = repository.name.removeprefix("models--").replace("--", "/")
    return f"{PREFIX}{name}@{folder.resolve().name}"


def is_content_of(folder: Path, target: Path) -> bool:
    """Whether `folder` is a snapshot in the cache, and `target` where the cache keeps contents for it.

    target: what a link in the folder leads to, all further links followed.
    """
    repository = _repository_of(folder)
    if repository is None:
        return False
    own, shared = repository / "blobs", repository.parent / "blobs" / target.name[:2]
    return target.parent == own or (target.parent == shared and bool(SHARED_HASH.fullmatch(target.name)))


def _repository_of(folder: Path) -> Path | None:
    """The folder models--OWNER--NAME that `folder` is a snapshot in, if it is one."""
    folder = folder.resolve()
    repository = folder.parent.parent
    laid_out = (
        repository.name.startswith("models--")
        and folder.parent.name == "snapshots"
        and COMMIT.fullmatch(folder.name)
        and (repository / "blobs").is_dir()
    )
    return repository if laid_out else None


@functools.cache
def _fetch(name: HubName) -> Path:
    folder, how = _cached(name), "from the cache"
    if folder is None:
        folder, how = _download(name), "downloaded"
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on this machine one says it
        print(f"{name}: commit {folder.name}, {how}, in {folder}", file=sys.stderr)
    return folder


def _cached(name: HubName) -> Path | None:
    """The model's folder in the cache, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name.repository, CONFIG, revision=name.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return None if _lacks(folder) else folder


def _lacks(folder: Path) -> str | None:
    """A file that a whole snapshot would have: every file of weights and a tokenizer."""
    weights = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        weights = _shards(folder / INDEX)
    missing = [file for file in (CONFIG, *weights) if not (folder / file).exists()]
    if not missing and not any((folder / file).exists() for file in TOKENIZERS):
        missing = [TOKENIZERS[0]]
    return missing[0] if missing else None


def _shards(index: Path) -> list[str]:
    """The files that an index names beside it; whoever opens the folder refuses others, and a damaged one."""
    try:
        named = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({file for file in named if SHARD.fullmatch(file)})
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _download(name: HubName) -> Path:
    """Downloads what is missing of a model; its folder in the cache."""
    import huggingface_hub

    require_reachable(f"{name} is not complete in this machine's cache")
    repository, revision = name
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=ANSWER
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = choose_files(
            name, sizes, lambda: huggingface_hub.hf_hub_download(repository, INDEX, revision=info.sha)
        )
        _require_room(name, sum(sizes[file] for file in files))
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except UserError:
        raise
    except Exception as error:  # of httpx and of the Hub: what it says of each
        raise _refusal(name, error) from error
    missing = next((file for file in files if not (folder / file).exists()), None)
    if missing or folder.name != info.sha:
        raise UserError(f"{name} is not whole, or was changed meanwhile: run the same command again")
    return folder


def choose_files(name: HubName, sizes: Mapping[str, int], index: Callable[[], str]) -> list[str]:
    """Which of a model's files are downloaded.

    Args:
        sizes: of all of its files, in bytes.
        index: downloads the one that says which file holds which tensor; called where weights are in parts.

    Raises:
        UserError: it has no config.json, or its weights are not safetensors.
    """
    if CONFIG not in sizes:
        raise UserError(f"{name} has no {CONFIG}: see {name.page('/tree/main')} for what it holds")
    if WEIGHTS in sizes:
        weights = [WEIGHTS]
    elif INDEX in sizes:
        weights = [INDEX, *(file for file in _shards(Path(index())) if file in sizes)]
    else:
        pickle = next((file for file in sizes if Path(file).suffix in PICKLES), None)
        if pickle:
            raise UserError(
                f"{name} holds its weights as {pickle}, a pickle, which can run arbitrary code when opened, "
                f"so it is not downloaded: ask its author for {WEIGHTS}"
            )
        raise UserError(
            f"{name} has neither {WEIGHTS} nor {INDEX}: see {name.page('/tree/main')} for what it holds"
        )
    return [CONFIG, *weights, *(file for file in OTHERS if file in sizes)]


def _require_room(name: HubName, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{name} takes {needed / 1e9:.2f} GB, and the disk of {cache} has {free / 1e9:.2f} GB free: free "
            "some space, or set HF_HOME to a folder on another disk"
        )


def _refusal(name: HubName, error: Exception) -> Exception:
    """What is to be raised for what the Hub or its client says."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and os_error(error):  # a full disk, say
        return error
    login = "log in with `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name} is gated: accept its terms on {name.page()}, then {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name} is not there: see {name.page('/tree/main')} for branches, tags and commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"there is no model {name}, or it is private: look for it at {name.page()}, and {login} if it is "
            "private"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0].strip() if lines else type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(f"{name} may not be read ({reason}): {login} with a token that may read it")
    return UserError(
        f"{name} could not be downloaded ({reason}): run the same command again, which keeps the files that "
        "are complete"
    )
