"""A Hugging Face folder, or a hub id, as an opened base model."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import safetensors as safetensors_map
from . import torch_pickle
from .base import OpenedBase
from .checkpoint import read_json
from .source import check_lfs, inside, resolve, sha256

if TYPE_CHECKING:
    import transformers

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_TEXTS = (
    _CONFIG,
    _GENERATION,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class FolderBase(OpenedBase):
    """A base model in Hugging Face's format, in a folder or on the hub."""

    def __init__(self, source: str):
        self._source = source

    @functools.cached_property
    def _folder(self) -> Path:
        return resolve(self._source, patterns=(_CONFIG, _GENERATION))

    @property
    def place(self) -> Path:
        return self._folder

    @property
    def config_place(self) -> Path:
        return self._folder / _CONFIG

    def config(self) -> Mapping[str, Any]:
        """Return the content of config.json, with the end tokens of generation_config.json too.

        Instruction-tuned models often end answers with tokens that only the latter has.
        """
        files = [self.config_place]
        if (generation := self._folder / _GENERATION).is_file():
            files.append(generation)
        found = []
        for path in files:
            if path.is_file():
                check_lfs(path)
            found.append(read_json(path, "a Hugging Face model"))
        ends = [*dict.fromkeys(token for raw in found for token in _ends(raw))]
        if len(ends) == len(_ends(found[0])):
            return found[0]
        return found[0] | {"eos_token_id": ends if len(ends) > 1 else ends[0]}

    def config_sha256(self) -> str:
        return sha256(self.config_place)

    def tensors(self) -> Mapping[str, np.ndarray]:
        return _open(self._weights())

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._source)
        except Exception as error:  # tokenizers raises a bare Exception on a file that it cannot parse
            raise ValueError(
                f"{self._source} gives no tokenizer: wanted a folder or hub id with config.json and tokenizer.json or "
                f"spiece.model. From transformers: {error}"
            ) from error

    def save_texts(self, folder: Path) -> None:
        origin = resolve(self._source, patterns=_TEXTS)
        for name in _TEXTS:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)

    def _weights(self) -> Path:
        """Return the folder with the weights; the .bin is fetched from the hub only if it has no safetensors."""
        folder = resolve(self._source, patterns=(_CONFIG, "model*.safetensors*"))
        if any(folder.glob("model*.safetensors*")):
            return folder
        return resolve(self._source, patterns=(_CONFIG, "pytorch_model*.bin*"))


def _ends(raw: Mapping[str, Any]) -> list[Any]:
    ends = raw.get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _open(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors by name as views of mapped files."""
    for name, load in ((_SAFETENSORS, safetensors_map.load), (_BIN, torch_pickle.load)):
        if (folder / name).is_file():
            return load(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            check_lfs(index)
            files = read_json(index, "a sharded model").get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{index} has no weight_map, which names the file of every tensor: fetch it again")
            # Every name is checked before the first file is opened.
            paths = [inside(folder, file) for file in files.values()]
            shards = {path: load(path) for path in set(paths)}
            for tensor, path in zip(files, paths, strict=True):
                if tensor not in shards[path]:
                    raise ValueError(f"{path} does not hold {tensor}, though {index.name} lists it: fetch it again")
            return {tensor: shards[path][tensor] for tensor, path in zip(files, paths, strict=True)}
    raise ValueError(f"{folder} has no weights: wanted {_SAFETENSORS} or {_BIN}, whole or in shards with an index")
