"""Links of the Markdown pages: every relative one points to a file, and every anchor to a heading."""

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/small/README.md")
_PAGES = [*(_ROOT / name for name in _TOP), *sorted((_ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
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
