"""The Markdown pages: links lead to files and headings, and commands, scripts and tests that they name exist."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest
from json_files import read_json

from lorafusion_jax import cli

_ROOT = Path(__file__).resolve().parent.parent
_PAGES = [
    *_ROOT.glob("*.md"),
    *sorted(_ROOT.glob("*/README.md")),
    *sorted(_ROOT.glob("examples/*/README.md")),
    *sorted(_ROOT.glob("docs/**/*.md")),
]
_NOTEBOOKS = sorted(_ROOT.glob("examples/notebooks/*.ipynb"))
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_COMMAND = re.compile(
    r"\blorafusion (crossbar (?:program|prepare|explore)|[a-z-]+)\b([^`#\n]*)"
)


def _name(page):
    return page.relative_to(_ROOT).as_posix()


def _text(page):
    """Return the text of a page, or the Markdown of a notebook."""
    if page.suffix == ".md":
        return page.read_text()
    cells = read_json(page)["cells"]
    texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
    return "\n\n".join(texts)


@functools.cache
def _anchors(page):
    """Return the anchors of headings by GitHub's rule: lower case, punctuation dropped, spaces to hyphens."""
    titles = re.findall(r"^#+ +(.+?) *#*$", _FENCE.sub("", _text(page)), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", [*_PAGES, *_NOTEBOOKS], ids=_name)
def test_relative_links_and_anchors_lead_somewhere(page):
    prose = _CODE.sub("", _FENCE.sub("", _text(page)))
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@functools.cache
def _help(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return printed.getvalue()


@pytest.mark.parametrize("page", _PAGES, ids=_name)
def test_commands_scripts_and_targets_of_a_page_exist(page):
    text = page.read_text()
    for command, arguments in _COMMAND.findall(text):
        # The options of `fuse` depend on its method.
        methods = re.findall(r" --method [a-z][a-z-]*", arguments)
        help_text = _help(command + "".join(methods[:1] if command == "fuse" else []))
        assert help_text, command
        options = re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments)
        if command != "lm-eval":  # passes on the options of another program
            known = set(re.findall(r"--[a-z][a-z-]*", help_text))
            assert set(options) <= known, command
    scripts = re.findall(r"\b(?:experiments|benchmarks|examples|tests)/\w+\.py\b", text)
    assert [name for name in scripts if not (_ROOT / name).is_file()] == []
    makefile = (_ROOT / "Makefile").read_text()
    targets = re.findall(
        r"(?:`|^    )(?:PYTHON=\S+ )?make ([a-z-]+)", text, re.MULTILINE
    )
    assert set(targets) <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_the_readme_is_short():
    assert len((_ROOT / "README.md").read_text().split()) <= 650
