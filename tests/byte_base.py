"""A base model with the embedded one's architecture, random weights and a tokenizer of bytes: it can read any text."""

import dataclasses
import shutil
from pathlib import Path

from flax import nnx
from json_files import read_json, write_json

from lorafusion_jax import read_config, save_base
from lorafusion_jax.models import T5

_SMALL = Path(__file__).resolve().parent.parent / "examples" / "small" / "base"
_VOCABULARY = 384  # 3 special tokens, 256 bytes, 125 that stand for spans


def make(folder, like=_SMALL):
    """Write the base, which must not be there yet, and return its folder. The adapters of the base `like` fit it."""
    from transformers import ByT5Tokenizer

    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(parents=True)
    config = read_json(like / "config.json") | {"vocab_size": _VOCABULARY}
    write_json(source / "config.json", config)
    ByT5Tokenizer().save_pretrained(source)
    model = T5(dataclasses.replace(read_config(source), tied=False), rngs=nnx.Rngs(0))
    save_base(model, folder, source)
    shutil.rmtree(source)
    return folder


if __name__ == "__main__":
    import sys

    print(make(Path(sys.argv[1])))
