"""What a base model's files are asked for, be they a Hugging Face folder or a GGUF file."""

import abc
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .gguf.reader import StoredTensor

if TYPE_CHECKING:
    import transformers

# A view of a mapped file, or a tensor that is dequantised when its rows are read.
Tensor = np.ndarray | StoredTensor


class OpenedBase(abc.ABC):
    """A base model's files. Each method reads what it returns when it is called."""

    @property
    @abc.abstractmethod
    def place(self) -> Path:
        """The folder or file, for messages."""

    @property
    @abc.abstractmethod
    def config_place(self) -> Path:
        """The file that holds the configuration, for messages."""

    @abc.abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Return the content of config.json."""

    @abc.abstractmethod
    def config_sha256(self) -> str:
        """Return the SHA-256 of config.json."""

    @abc.abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights under Hugging Face's names and in its layout, [d_out, d_in]."""

    @abc.abstractmethod
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """Load the tokenizer; raises ValueError if there is none."""

    @abc.abstractmethod
    def save_texts(self, folder: Path) -> None:
        """Write config.json and the tokenizer's files as a Hugging Face folder holds them."""


def release(tensor: Tensor) -> None:
    """Unmap the pages of a file whose tensor was read, which would count as memory of this process."""
    owner = tensor.base.obj if isinstance(tensor.base, memoryview) else tensor.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)
