"""A GGUF file as an opened base model, with the same methods as `hf_folder.FolderBase`."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.architecture import GGUFTensor
from ...models.registry import gguf_layout
from ...support.reading import error_context
from ...support.writing import write_text
from ..fast_tokenizer import FastTokenizer
from .reader import StoredTensor, read_gguf
from .tokenizer import build_tokenizer

if TYPE_CHECKING:
    import transformers


class GGUFBase:
    """A base model in a GGUF file; ValueError if it is not sound, or of an unknown architecture."""

    def __init__(self, file: Path):
        self.place = self.config_place = file  # for messages
        self._metadata, self._tensors = read_gguf(file)
        with error_context(file):
            self._layout = gguf_layout(
                self._metadata.get("general.architecture"), "general.architecture"
            )

    @property
    def config(self) -> Mapping[str, Any]:
        """The metadata as a config.json of Hugging Face."""
        with error_context(self.place):
            return self._layout.config_json(self._metadata, self._tensors)

    def config_sha256(self) -> str:
        """Return the SHA-256 of the config.json that `save_texts` writes."""
        return hashlib.sha256(self._config_text().encode()).hexdigest()

    def tokenizer_sha256(self) -> str:
        """Return the SHA-256 of the metadata about the tokenizer, without chat templates."""
        used = {
            name: value
            for name, value in self._metadata.items()
            if name.startswith("tokenizer.")
            and not name.startswith("tokenizer.chat_template")
        }
        return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()

    def tensors(self) -> Mapping[str, StoredTensor]:
        """Return the weights with Hugging Face's names and layout, [d_out, d_in]."""
        places = self._layout.stored(self.config, self._tensors)
        return {hf.name: self._tensors[name].changed(hf) for name, hf in places.items()}

    def stored(self) -> Iterator[tuple[str, GGUFTensor | None, StoredTensor]]:
        """Yield each tensor's name, its place in Hugging Face's files (or None), and the tensor."""
        layout = self._layout.stored(self.config, self._tensors)
        for name, tensor in self._tensors.items():
            yield name, layout.get(name), tensor

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """Build the tokenizer; raises ValueError if the file has none."""
        return self.fast_tokenizer().whole

    def fast_tokenizer(self) -> FastTokenizer:
        """Build the tokenizer without transformers; raises ValueError if the file has none."""
        with error_context(self.place):
            return build_tokenizer(self._metadata, str(self.place))

    def save_texts(self, folder: Path) -> None:
        """Write config.json and the files of the tokenizer."""
        write_text(folder / "config.json", self._config_text())
        self.tokenizer().save_pretrained(folder)

    def _config_text(self) -> str:
        return json.dumps(self.config, indent=2) + "\n"
