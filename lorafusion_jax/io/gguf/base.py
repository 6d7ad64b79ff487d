"""A GGUF file as an opened base model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_text
from ...models.architecture import Stored
from ...models.registry import gguf_layout
from ..base import OpenedBase
from .reader import StoredTensor, read_gguf
from .tokenizer import build_tokenizer

if TYPE_CHECKING:
    import transformers


class GGUFBase(OpenedBase):
    """A base model in a GGUF file.

    Raises:
      ValueError: as in `read_gguf`, or the architecture is not known.
    """

    def __init__(self, file: Path):
        self._file = file
        self._metadata, self._tensors = read_gguf(file)
        try:
            self._layout = gguf_layout(self._metadata.get("general.architecture"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @property
    def place(self) -> Path:
        return self._file

    @property
    def config_place(self) -> Path:
        return self._file

    def config(self) -> Mapping[str, Any]:
        try:
            return self._layout.config_json(self._metadata, self._tensors)
        except ValueError as error:
            raise ValueError(f"{self._file}: {error}") from None

    def config_sha256(self) -> str:
        return hashlib.sha256(self._config_text().encode()).hexdigest()

    def tensors(self) -> Mapping[str, StoredTensor]:
        found = self._layout.stored(self.config(), self._tensors)
        return {hf.name: self._tensors[name].changed(hf.heads, hf.offset) for name, hf in found.items()}

    def stored(self) -> Iterator[tuple[str, Stored | None, StoredTensor]]:
        """Yield the name and content of every tensor, and what Hugging Face's files have instead, if anything."""
        known = self._layout.stored(self.config(), self._tensors)
        for name, tensor in self._tensors.items():
            yield name, known.get(name), tensor

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        try:
            return build_tokenizer(self._metadata)
        except ValueError as error:
            raise ValueError(f"{self._file}: {error}") from error

    def save_texts(self, folder: Path) -> None:
        write_text(folder / "config.json", self._config_text())
        self.tokenizer().save_pretrained(folder)

    def _config_text(self) -> str:
        return json.dumps(self.config(), indent=2) + "\n"
