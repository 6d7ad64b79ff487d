"""The Markdown pages: links lead to files and headings, and commands have the options that they are shown with."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from lorafusion_jax import cli

_ROOT = Path(__file__).resolve().parent.parent
_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/small/README.md")
_PAGES = [*(_ROOT / name for name in _TOP), *sorted((_ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"\blorafusion (crossbar program|[a-z]+)\b([^`#\n]*)")
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)


def _anchors(text: str) -> set[str]:
    """Anchors of the headings by GitHub's rule: lower case, punctuation dropped, spaces to hyphens, repeats counted."""
    found: set[str] = set()
    for title in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        numbered = (f"{slug}-{n}" for n in range(1, len(found) + 1))
        found.add(slug if slug not in found else next(name for name in numbered if name not in found))
    return found


def _broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(_ROOT).as_posix())
def test_relative_links_and_anchors_lead_somewhere(page):
    assert not _broken(page), f"{page} links to what is not there"


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One `two`, three\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](other.md#again-1) [d](https://example.org/gone.md)\n"
        "![e](gone.png) [f](other.md#again-2) [g](#here) `[h](not_a_link.md)`\n\n"
        "```\n# Here\n[i](not_a_link.md)\n```\n"
    )
    assert _broken(page) == ["gone.png", "other.md#again-2", "#here"]


@functools.cache
def _help(subcommand: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*subcommand.split(), "--help"])
    return printed.getvalue()


def _unknown(text: str) -> list[str]:
    """Each subcommand, or option of one, that a text shows and `--help` does not."""
    unknown = []
    for subcommand, rest in _COMMAND.findall(text):
        if not _help(subcommand):
            unknown.append(subcommand)
        shown = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)
        unknown += [f"{subcommand} {name}" for name in shown if not re.search(rf"{name}\b(?!-)", _help(subcommand))]
    return unknown


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(_ROOT).as_posix())
def test_commands_have_the_options_that_are_shown(page):
    text = page.read_text()
    assert not _unknown(text)
    scripts = re.findall(r"\b(?:experiments|benchmarks|examples|tests)/\w+\.py\b", text)
    assert [name for name in scripts if not (_ROOT / name).is_file()] == []
    targets = set(re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )(?:PYTHON=\S+ )?make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_a_command_with_an_unknown_option_is_found():
    assert _unknown("`lorafusion fuse --seeds 1 --sweets 2`, `lorafusion fuse --seed 3`, lorafusion bake\n") == [
        "fuse --sweets",
        "fuse --seed",
        "bake",
    ]
    assert _unknown("XLA_FLAGS=--xla_x=2 lorafusion fuse ... --mesh seed=2  # --not-one") == []
