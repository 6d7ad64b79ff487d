"""Pages that docs/generate.py writes are current, and help texts are narrow."""

import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest

import lorafusion_jax as lf

_DOCS = Path(__file__).parents[2] / "docs"
_PAGES = list(runpy.run_path(str(_DOCS / "generate.py"))["pages"]())


def test_generated_pages_are_current():
    for path, text in _PAGES:
        assert path.read_text() == text, "run python docs/generate.py"


def test_help_texts_have_at_most_90_columns():
    text = next(text for path, text in _PAGES if path.name == "cli.md")
    lines = [line for line in text.splitlines() if not line.startswith("usage: ")]
    assert [line for line in lines if len(line) > 90] == []


@pytest.mark.parametrize("module", [lf, lf.crossbar, lf.trials, lf.estimates])
def test_signatures_have_no_tilde_of_sphinx(module):
    """Sphinx shows a tilde before the names of a signature that is no Python; `shorten` refuses those."""
    shorten = runpy.run_path(str(_DOCS / "signatures.py"))["shorten"]
    for name, member in vars(module).items():
        if inspect.isclass(member) and dataclasses.is_dataclass(member):
            text = shorten(str(inspect.signature(member)))
            assert "<" not in text, name
