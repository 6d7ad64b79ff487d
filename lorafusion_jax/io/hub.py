"""Repositories of the Hugging Face hub that are written to. `source.resolve` reads from them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .source import first_line


def make_repository(name: str, *, private: bool) -> None:
    """Make the repository `owner/name`, private or not, or check that an existing one can be written to.

    Raises:
      ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _refusals(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)


def upload(folder: Path, name: str) -> str:
    """Upload a folder to a repository of the hub in one commit, and return its address; other files there stay.

    Raises:
      ValueError: the hub refuses, or cannot be reached. The folder is unchanged.
    """
    from huggingface_hub import HfApi

    with _refusals(name, f"; {folder} is complete, upload it again with: hf upload {name} {folder}"):
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by lorafusion-jax")
        return commit.repo_url


@contextlib.contextmanager
def _refusals(name: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the HTTP library raises others if the hub cannot be reached
        raise ValueError(
            f"the hub did not take {name}: {first_line(error)} (expected owner/name of an account that you may write "
            f"to, and its token by `hf auth login` or in HF_TOKEN){then}"
        ) from error
