"""Nothing outside a family's own folder and the registry's line names the family, its stacks or its sites."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafusion_jax.models.families import FAMILIES
from lorafusion_jax.models.t5.config import SHAPES

_PACKAGE = Path(__file__).resolve().parent.parent / "lorafusion_jax"
_OF_FAMILIES = {_PACKAGE / "models" / "families.py", *(_PACKAGE / "models" / "t5").glob("*.py")}
# Fields of its config, which `Architecture` does not have.
_FIELDS = {"num_layers", "num_decoder_layers", "d_kv", "scale_logits", "start_id", "gated"}
# Names of shapes and hub ids, as options' defaults, examples and measurements give them.
_SHAPE = re.compile(r"(google/)?(flan-)?t5-\w+|flan_t5_large-\w+|FLAN-T5(-\w+)?")
_LETTERS = {"q", "k", "v"}


def _words() -> set[str]:
    """The words that belong to T5: its stacks, its sites whole and by their last names, and fields of its config."""
    words = {"T5", "t5", *FAMILIES, *_FIELDS}
    for config in SHAPES.values():
        words |= {*config.stacks, *config.sites, *(name.rpartition(".")[2] for name in config.sites)}
    return words


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of a file's strings, and the names that its code uses."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)):
                yield node.lineno, text
            case ast.Attribute(attr=text) | ast.Name(id=text) | ast.keyword(arg=str(text)) | ast.arg(arg=text):
                yield node.lineno, text


def _named(source: str) -> Iterator[str]:
    """The words of T5 in code and docstrings, by line; single letters only where they are strings of their own."""
    words = _words()
    for line, text in _texts(source):
        bare = _SHAPE.sub("", text)
        parts = {bare, *re.findall(r"\w+(?:\.\w+)*", bare), *re.findall(r"\w+", bare)}
        for word in sorted(parts & (words - _LETTERS - {"o"})):
            yield f"{line} says {word}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            letters = {e.value for e in node.elts if isinstance(e, ast.Constant)} & _LETTERS
            if len(letters) > 1:
                yield f"{node.lineno} says {' '.join(sorted(letters))}"


@pytest.mark.smoke
def test_only_the_family_s_folder_and_the_registry_name_it():
    found = []
    for path in sorted(set(_PACKAGE.rglob("*.py")) - _OF_FAMILIES):
        source = path.read_text()
        found += [f"{path.relative_to(_PACKAGE)}:{said}" for said in _named(source)]
        comments = re.findall(r"#[^\n]*\bm?T5[^\n]*", _SHAPE.sub("", source))
        found += [f"{path.relative_to(_PACKAGE)} says {comment}" for comment in comments]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        'site.startswith("decoder")',
        "config.num_decoder_layers",
        'targets = ("q", "v")',
        '"""Such as `encoder.self.q`."""',
        "T5(config, rngs)",
        "f(wi=1)",
    ],
)
def test_names_are_found(source):
    assert list(_named(source))
