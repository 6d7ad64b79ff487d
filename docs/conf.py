"""The documentation site: `make docs`."""

import re
import shutil
import sys
from pathlib import Path

import lorafusion_jax

sys.path.insert(0, str(Path(__file__).parent))
from signatures import shorten

project = "lorafusion-jax"
author = "the lorafusion-jax contributors"
copyright = f"2026, {author}"
release = lorafusion_jax.__version__
html_theme = "furo"
html_title = project

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "off"  # the outputs are in the notebooks; tests run them
myst_heading_anchors = (
    4  # named as GitHub names them, so that the same links work in both places
)
highlight_language = "none"

# Pages link to the notebooks where they are in the repository; on the site they are in a folder of the pages.
_HERE = Path(__file__).parent
shutil.copytree(
    _HERE / "../examples/notebooks",
    _HERE / "notebooks",
    dirs_exist_ok=True,
    ignore=lambda *_: ["runs"],
)

default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_attr_annotations = False


def _as_text(_app, what: str, _name: str, _object, _options, lines: list[str]) -> None:
    # Docstrings are read in an editor more often than here: |x| and [*C L] are no markup in them, and an example is
    # one without a second colon. The pages of modules have introductions of their own.
    if what == "module":
        lines.clear()
    if what == "property":  # napoleon takes what is before a colon for a type
        lines[0] = lines[0].replace(": ", ", ")
    for i, line in enumerate(lines):
        line = re.sub(
            r"(`[^`]*`)|([*|])(?! )", lambda found: found[1] or "\\" + found[2], line
        )
        lines[i] = re.sub(r"^(Examples?):$", r"\1::\n", line)
    lines[:] = "\n".join(lines).split("\n")


def _skipped(
    _app, _what: str, _name: str, member: object, _skip: bool, _options
) -> bool | None:
    # A field of a named tuple is described by its class.
    return True if type(member).__name__ == "_tuplegetter" else None


def _short(
    _app, _what, _name, _object, _options, *texts: str | None
) -> tuple[str | None, ...]:
    return tuple(text and shorten(text) for text in texts)


def _to_copies(_app, name: str, source: list[str]) -> None:
    source[0] = source[0].replace("../../examples/notebooks/", "../notebooks/")
    for folder in ("benchmarks", "experiments", "tests"):  # their Markdown is no page
        source[0] = source[0].replace(f"](../../{folder}/", f"](path:../../{folder}/")
    if name.startswith("notebooks/"):  # two folders deep in the repository
        source[0] = (
            source[0]
            .replace("../../docs/", "../")
            .replace("../../CONTRIBUTING.md", "../contributing.md")
        )


def setup(app) -> None:
    app.connect("source-read", _to_copies)
    app.connect("autodoc-skip-member", _skipped)
    app.connect("autodoc-process-signature", _short)
    app.connect("autodoc-process-docstring", _as_text, priority=400)  # before napoleon
