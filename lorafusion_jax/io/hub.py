"""Repositories of the Hugging Face hub that are written to. `source.resolve` reads from them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .source import first_line

_T = TypeVar("_T")


def make_repository(name: str, *, private: bool) -> None:
    """Make a repository of the hub, or find that it may be written to.

    Args:
      name: owner/name.
      private: make it private, if it is not there.

    Raises:
      ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    _asked(name, lambda: HfApi().create_repo(name, private=private or None, exist_ok=True))


def upload(folder: Path, name: str) -> str:
    """Upload a folder to a repository of the hub in one commit, and return its address; other files there stay.

    Raises:
      ValueError: the hub refuses, or cannot be reached. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    commit = _asked(
        name,
        lambda: HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by lorafusion-jax"),
        f"; {folder} is complete, upload it again with: hf upload {name} {folder}",
    )
    return commit.repo_url


def _asked(name: str, ask: Callable[[], _T], then: str = "") -> _T:
    try:
        return ask()
    except Exception as error:  # of many kinds: of the HTTP library where the hub cannot be reached
        raise ValueError(
            f"the hub did not take {name}: {first_line(error)} (expected owner/name of an account that you may write "
            f"to, and its token by `hf auth login` or in HF_TOKEN){then}"
        ) from error
