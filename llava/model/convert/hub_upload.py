"""Uploading a finished folder to the hub."""

from pathlib import Path

from llava.errors import LlavaError, library_errors


def check_can_upload(repo_id: str) -> None:
    """Fail before any work if nobody is logged in or the id isn't one."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LlavaError(f"--hub-repo-id {repo_id}: not the id of a hub repository ({error})") from error
    if get_token() is None:
        raise LlavaError("--hub-repo-id needs a login to the hub: run `hf auth login` or set HF_TOKEN")


def upload_folder(folder: Path, repo_id: str) -> str:
    """Make the repository if needed and upload the folder; returns its address.

    Raises:
        LlavaError: the hub can't be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with library_errors(f"{folder} is complete, but uploading it to {repo_id} failed"):
        address = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(address)
