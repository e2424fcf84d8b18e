"""An exported folder goes to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from core.cli import shell_quoted
from core.errors import UserError


def push(folder: Path, name: str, private: bool, dry_run: bool) -> None:
    """Uploads the folder as the model `name` ("user/name"), made if it is not there; `dry_run` only lists.

    private: nobody else sees it.

    Raises:
        UserError: the Hub refuses, or the model is there and public where it should be private; the folder
            stays as it is.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    by_hand = f"hf upload {name} {shell_quoted(str(folder))}{' --private' if private else ''}"
    if dry_run:
        print(f"would upload to {name}{', private' if private else ''}:")
        for path in files:
            print(f"  {path.stat().st_size:>13,}  {path.relative_to(folder)}")
        print(f"  {sum(path.stat().st_size for path in files):>13,}  bytes in all; to upload them: {by_hand}")
        return
    try:
        api = HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)  # None: as the organization has it
        # One that exists stays as visible as it was, whatever `private` says.
        public = private and not api.model_info(name).private
        if public:
            raise UserError(
                f"{name} exists on the Hub and is public, not private: {folder} is complete, but "
                "was not uploaded; make that repository private in its settings, or name another"
            )
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from MTLM")
    except UserError:
        raise
    except Exception as error:  # the Hub's, or of httpx, whose name and errors vary with the client's version
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{folder} is complete, but was not uploaded ({reason}): "
            f"fix that (`hf auth login`?), then `{by_hand}`"
        ) from error
    print(f"uploaded: {commit.commit_url}")
