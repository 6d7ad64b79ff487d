"""Nothing outside the families' own folders and the registry's lines names a family, its stacks or its sites."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafusion_jax.models import known_shapes
from lorafusion_jax.models.registry import FAMILIES

_PACKAGE = Path(__file__).resolve().parent.parent / "lorafusion_jax"
_OF_FAMILIES = {_PACKAGE / "models" / "registry.py"}.union(
    *((_PACKAGE / "models" / family).glob("*.py") for family in FAMILIES)
)
_MEMBERS = {
    "T5",
    "t5",
    "Llama",
    "SmolLM2",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Phi",
    "Granite",
    "OLMo",
    "LLaVA",
}
# Fields of their configs, which `Architecture` does not have.
_FIELDS = {
    "num_layers",
    "num_decoder_layers",
    "d_kv",
    "scale_logits",
    "start_id",
    "gated",
}
_FIELDS |= {
    "qk_norm",
    "post_norms",
    "local_rope",
    "query_scale",
    "embedding_scale",
    "residual_scale",
    "pre_norms",
}
# Names of shapes and hub ids, as options' defaults, examples and measurements give them.
_SHAPE = re.compile(
    r"(google/)?(flan-)?t5-\w+|flan_t5_large-\w+|FLAN-T5(-\w+)?|HuggingFaceTB/[\w-]+"
    r"|Mistral's own layout"
)
_LETTERS = {"q", "k", "v"}


def _words() -> set[str]:
    """The words that belong to families: stacks, sites whole and by their last names, and fields of configs."""
    words = {*_MEMBERS, *FAMILIES, *_FIELDS}
    for config in known_shapes().values():
        words |= {
            *config.stacks,
            *config.sites,
            *(name.rpartition(".")[2] for name in config.sites),
        }
    return words


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of a file's strings, and the names that its code uses."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(
                value=ast.Name(id="backend" | "tokenizer"), attr="decoder"
            ):
                pass  # a name of the library tokenizers
            case ast.Constant(value=str(text)):
                yield node.lineno, text
            case (
                ast.Attribute(attr=text)
                | ast.Name(id=text)
                | ast.keyword(arg=str(text))
                | ast.arg(arg=text)
            ):
                yield node.lineno, text


def _named(source: str) -> Iterator[str]:
    """The words of families in code and docstrings, by line; single letters only in strings of their own."""
    words = _words()
    for line, text in _texts(source):
        bare = _SHAPE.sub("", text)
        parts = {bare, *re.findall(r"\w+(?:\.\w+)*", bare), *re.findall(r"\w+", bare)}
        for word in sorted(parts & (words - _LETTERS - {"o"})):
            yield f"{line} says {word}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            letters = {
                e.value for e in node.elts if isinstance(e, ast.Constant)
            } & _LETTERS
            if len(letters) > 1:
                yield f"{node.lineno} says {' '.join(sorted(letters))}"


@pytest.mark.smoke
def test_only_the_family_s_folder_and_the_registry_name_it():
    for source in (
        'sites["decoder.mlp.up_proj"]',
        'targets = ("q", "v")',
        '"Such as `encoder.self.q`."',
        "f(wi=1)",
    ):
        assert list(_named(source))
    found = []
    for path in sorted(set(_PACKAGE.rglob("*.py")) - _OF_FAMILIES):
        source = path.read_text()
        found += [f"{path.relative_to(_PACKAGE)}:{said}" for said in _named(source)]
        comments = re.findall(r"#[^\n]*\bm?T5[^\n]*", _SHAPE.sub("", source))
        found += [
            f"{path.relative_to(_PACKAGE)} says {comment}" for comment in comments
        ]
    assert not found
