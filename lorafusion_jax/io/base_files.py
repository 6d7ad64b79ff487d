"""The files of a base model: a Hugging Face folder, a hub id or a GGUF file, with the same methods."""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

import numpy as np

from ..models.architecture import GGUFTensor
from ..models.registry import family_of_json, gguf_layout
from ..support.checks import panics
from ..support.reading import FileError, decode_as, error_context, read_json
from ..support.writing import write_text
from .fast_tokenizer import FastTokenizer
from .gguf.reader import StoredTensor, read_gguf
from .gguf.tokenizer import build_tokenizer
from .source import inside, other_layout, resolve, sha256
from .tensor_files import load_tensors

if TYPE_CHECKING:
    import transformers

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_FURTHER = ("added_tokens.json", "special_tokens_map.json", _TEMPLATE)
_IMAGES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_UNCHANGED = (
    100_000  # transformers looks for faults of known models in larger vocabularies
)
_TEXTS = (
    *(_CONFIG, _GENERATION, _TOKENIZER, _TOKENIZER_CONFIG, *_FURTHER),
    *("merges.txt", "spiece.model", "tokenizer.model", "vocab.json"),
    *_IMAGES,
)
_TOKENIZER_FILES = [
    name for name in _TEXTS if name not in (_CONFIG, _GENERATION, _TEMPLATE, *_IMAGES)
]


class _Plain(TypedDict, total=False):
    """A tokenizer_config.json that changes nothing of tokenizer.json but the names of special tokens."""

    backend: Literal["tokenizers"]
    clean_up_tokenization_spaces: Required[Literal[False]]
    model_max_length: float
    tokenizer_class: Required[Literal["PreTrainedTokenizerFast", "TokenizersBackend"]]
    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: Required[str]


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Ends(TypedDict, total=False):
    eos_token_id: int | list[int] | None


class FolderBase:
    """A base model in Hugging Face's format, in a folder or on the hub. Each method reads its files when called."""

    def __init__(self, source: str):
        self._source = source

    @functools.cached_property
    def place(self) -> Path:
        """The local folder, for messages."""
        return resolve(self._source, patterns=(_CONFIG, _GENERATION))

    @property
    def config_place(self) -> Path:
        """The path of config.json, for messages."""
        return self.place / _CONFIG

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json, with the end tokens of generation_config.json too.

        Instruction-tuned models often end answers with tokens that only the latter has.
        """
        layout = other_layout(self.place)
        if layout and not self.config_place.is_file():
            raise FileError(self.place, got="has no config.json", fix=layout)
        files = [self.config_place]
        if (generation := self.place / _GENERATION).is_file():
            files.append(generation)
        contents = []
        ends: list[list[int]] = []
        for path in files:
            contents.append(
                read_json(
                    path, dict[str, Any], "a Hugging Face model", allow_unknown=True
                )
            )
            fields = decode_as(contents[-1], _Ends, path, allow_unknown=True)
            tokens = fields.get("eos_token_id")
            if tokens is None:
                tokens = []
            ends.append(tokens if isinstance(tokens, list) else [tokens])
        every = [*dict.fromkeys(token for file_tokens in ends for token in file_tokens)]
        if len(every) == len(ends[0]):
            return contents[0]
        return contents[0] | {"eos_token_id": every if len(every) > 1 else every[0]}

    def config_sha256(self) -> str:
        """Return the SHA-256 of config.json."""
        return sha256(self.config_place)

    def tokenizer_sha256(self) -> str:
        """Return the SHA-256 of the tokenizer's files, without chat templates and whatever the order of settings."""
        folder = self._texts()
        sha = hashlib.sha256()
        for name in _TOKENIZER_FILES:
            if (path := folder / name).is_file():
                content = path.read_bytes()
                if name == _TOKENIZER_CONFIG:
                    settings = read_json(
                        path,
                        dict[str, Any],
                        "a Hugging Face tokenizer",
                        allow_unknown=True,
                    )
                    settings.pop("chat_template", None)
                    content = json.dumps(settings, sort_keys=True).encode()
                sha.update(f"{name} {len(content)}\n".encode() + content)
        return sha.hexdigest()

    def tensors(self) -> Mapping[str, np.ndarray]:
        """Return the weights by name, [d_out, d_in]; a .bin is fetched from the hub only without safetensors."""
        folder = resolve(self._source, patterns=(_CONFIG, "model*.safetensors*"))
        if not any(folder.glob("model*.safetensors*")):
            folder = resolve(self._source, patterns=(_CONFIG, "pytorch_model*.bin*"))
        return _open(folder)

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """Load the tokenizer; raises ValueError if there is none."""
        from transformers import AutoTokenizer

        try:
            folder = self._texts()
            # By default, transformers may offer on a terminal to run the repository's code.
            with panics():
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), trust_remote_code=False
                )
            tokenizer.name_or_path = self._source  # for messages
            return tokenizer
        except FileError:
            raise
        except (
            Exception
        ) as error:  # tokenizers raises a bare Exception on a file that it cannot parse
            raise ValueError(
                f"{self._source} gives no tokenizer: expected a folder or hub id with config.json and tokenizer.json "
                f"or spiece.model. Found: {error}"
            ) from error

    def fast_tokenizer(self) -> "FastTokenizer | transformers.PreTrainedTokenizerBase":
        """Load the tokenizer, without transformers if tokenizer.json has all of it; raises ValueError like `tokenizer`.

        For some causal models transformers takes only the vocabulary from that file.
        """
        from tokenizers import Tokenizer

        if family_of_json(self.config).read_config(self.config).causal:
            return self.tokenizer()
        folder = self._texts()
        file = folder / _TOKENIZER
        try:
            settings = read_json(
                folder / _TOKENIZER_CONFIG, _Plain, "a Hugging Face tokenizer"
            )
        except FileError:  # missing, damaged, or with settings that `_Plain` lacks: for transformers to judge
            return self.tokenizer()
        if not file.is_file() or any((folder / name).is_file() for name in _FURTHER):
            return self.tokenizer()
        try:
            with panics():
                backend = Tokenizer.from_file(str(file))
        except Exception as error:  # it raises bare ones
            fix = "give a base with a sound tokenizer"
            raise FileError(file, got=f"not a tokenizer ({error})", fix=fix) from error
        if backend.truncation or backend.get_vocab_size() > _UNCHANGED:
            return self.tokenizer()
        special = {
            name: str(text)
            for name, text in settings.items()
            if name.endswith("_token")
        }
        return FastTokenizer(backend, special, None, self._source, self.tokenizer)

    def _texts(self) -> Path:
        """Return the folder with the configuration and the tokenizer, each a file that can be read to its end."""
        return resolve(self._source, patterns=_TEXTS)

    def save_texts(self, folder: Path) -> None:
        """Copy config.json and the files of the tokenizer."""
        origin = self._texts()
        # In the hub's cache, files are links to a folder next to the one that has the snapshots.
        if origin.parent.name == "snapshots":
            allowed_folder = origin.resolve().parents[1]
        else:
            allowed_folder = origin.resolve()
        for name in _TEXTS:
            if (path := origin / name).is_file():
                if not path.resolve().is_relative_to(allowed_folder):
                    raise FileError(
                        path,
                        got="a link out of its folder",
                        fix="put a copy of the file itself there",
                    )
                shutil.copyfile(path, folder / name)


def _open(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors by name as views of mapped files."""
    for name in (_SAFETENSORS, _BIN):
        if (folder / name).is_file():
            return load_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = read_json(index, _Index, "a sharded model", allow_unknown=True)[
                "weight_map"
            ]
            paths = {tensor: inside(folder, file) for tensor, file in files.items()}
            shards = {path: load_tensors(path) for path in set(paths.values())}
            for tensor, path in paths.items():
                if tensor not in shards[path]:
                    got = f"does not hold {tensor}, though {index.name} lists it"
                    raise FileError(path, got=got, fix="fetch it again")
            return {tensor: shards[path][tensor] for tensor, path in paths.items()}
    expected = f"{_SAFETENSORS} or {_BIN}, whole or in shards with an index"
    fix = other_layout(folder) or "fetch the weights as well"
    raise ValueError(f"{folder} has no weights: expected {expected}; {fix}")


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
