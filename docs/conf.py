"""The documentation site: `make docs`."""

import os
import re
import subprocess
import sys

from docutils import nodes
from docutils.parsers.rst import Directive

import lorafusion_jax

project = "lorafusion-jax"
author = "the authors of lorafusion-jax"
release = lorafusion_jax.__version__
html_theme = "furo"
html_title = project

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # named as GitHub names them, so that the same links work in both places
highlight_language = "none"

default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures keep theirs
napoleon_use_ivar = True
napoleon_attr_annotations = False


class Help(Directive):
    """`{help} fuse`: what `lorafusion fuse --help` prints."""

    optional_arguments = 2

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "lorafusion_jax.cli", *self.arguments, "--help"]
        wide = os.environ | {"COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
        text = subprocess.run(command, env=wide, check=True, capture_output=True, text=True).stdout
        return [nodes.literal_block(text, text, language="none")]


def _as_text(_app, what: str, _name: str, _object, _options, lines: list[str]) -> None:
    # Docstrings are read in an editor more often than here: |x| and [*C L] are no markup in them, and an example is
    # one without a second colon. The pages of modules have introductions of their own.
    if what == "module":
        lines.clear()
    for i, line in enumerate(lines):
        line = re.sub(r"(`[^`]*`)|([*|])(?! )", lambda found: found[1] or "\\" + found[2], line)
        lines[i] = re.sub(r"^(Examples?):$", r"\1::", line)


def _skipped(_app, _what: str, _name: str, member: object, _skip: bool, _options) -> bool | None:
    # A field of a named tuple is described by its class.
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app) -> None:
    app.connect("autodoc-skip-member", _skipped)
    app.connect("autodoc-process-docstring", _as_text, priority=400)  # before napoleon
    app.add_directive("help", Help)
