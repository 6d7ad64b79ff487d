"""The Markdown pages: links lead to files and headings, commands have the options shown, and the prose is plain."""

import ast
import collections
import contextlib
import functools
import io
import itertools
import json
import re
import tokenize
from pathlib import Path

import pytest

from lorafusion_jax import cli

_ROOT = Path(__file__).resolve().parent.parent
_TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
_NOTEBOOKS = sorted((_ROOT / "examples" / "notebooks").glob("*.ipynb"))
_PAGES = [
    *(_ROOT / name for name in _TOP),
    *sorted(_ROOT.glob("examples/*/README.md")),
    *sorted(_ROOT.glob("docs/**/*.md")),
]

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(
    r"\blorafusion (crossbar (?:program|prepare)|[a-z-]+)\b([^`#\n]*)"
)
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)

# Phrases that make readers stop, each with a better one.
_HABITS = {
    r"\bof (?:its|their|your|our|his) own\b": "its own ..., separate, another",
    r"\bthat (?:is|are|was|were) (?:already )?there\b": "existing",
    r"\b(?:in|takes?|took) (?:the )?place of\b": "instead of; replaces",
    r"\bbesides?\b": "next to; in addition to",
    r"\bfor want of\b|\blest\b": "because there is no; so that ... not",
    r"\bc(?:ome|omes|ame) of\b|\bwhat c(?:ome|omes|ame)\b": "the effect; the given value",
    r"\bthe rest\b": "the others",
    r"\brows (?:that )?(?:train|validate|test)\b": "training rows; rows are used for training",
    r"\bno \w+ that\b": "a verb with not",
    r"\bof which\b|\bwhichever\b": "a second sentence",
    r"\b(?:says?|said|knows?|wants?|wanted|asks?|promises?)\b": "contains, returns, requires, shows",
    r"\banswers? for\b": "serves; the answer to",
    r"\bgo(?:es)? on\b|\bwent on\b": "continues",
    r"\bwrit(?:es|ten|e) over\b": "overwrites",
    r"\bnext to nothing\b": "hardly",
}
# An entry of a docstring that is no noun phrase.
_VAGUE_ENTRY = re.compile(
    r"^ +\*{0,2}\w+: (?:of|what|how|which|whose|whether) .*",
    re.MULTILINE | re.IGNORECASE,
)
# Hits that are good English, by page.
_ALLOWED: dict[str, tuple[str, ...]] = {
    "README.md": ("want the paper's experiment",),
    "docs/index.md": ("want the paper's experiment", "want evidence"),
}


def _anchors(text: str) -> set[str]:
    """Anchors of the headings by GitHub's rule: lower case, punctuation dropped, spaces to hyphens, repeats counted."""
    found: set[str] = set()
    for title in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        numbered = (f"{slug}-{n}" for n in range(1, len(found) + 1))
        found.add(
            slug
            if slug not in found
            else next(name for name in numbered if name not in found)
        )
    return found


def _broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", _text(page)))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            anchor and anchor not in _anchors(target.read_text())
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize(
    "page", [*_PAGES, *_NOTEBOOKS], ids=lambda page: page.relative_to(_ROOT).as_posix()
)
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


def test_the_sidebar_is_short_and_has_each_page_once():
    entries: dict[Path, list[Path]] = {}
    for page in sorted((_ROOT / "docs").rglob("*.md")):
        trees = re.findall(
            r"^```{toctree}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        )
        lines = [
            line
            for tree in trees
            for line in tree.splitlines()
            if line and not line.startswith(":")
        ]
        entries[page] = [(page.parent / line).resolve() for line in lines]
    top = entries.pop(_ROOT / "docs" / "index.md")
    assert (
        len(top) + max(map(len, entries.values())) <= 30
    )  # one part is open at a time
    pages = collections.Counter(
        [*top, *itertools.chain.from_iterable(entries.values())]
    )
    assert [page for page, times in pages.items() if times > 1] == []


@pytest.mark.parametrize(
    "path", sorted((_ROOT / "lorafusion_jax").rglob("*.py")), ids=lambda path: path.stem
)
def test_docstrings_comments_and_messages_are_plain(path):
    source = path.read_text()
    comments = [
        line.string
        for line in tokenize.generate_tokens(io.StringIO(source).readline)
        if line.type == tokenize.COMMENT
    ]
    texts = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
    ]
    prose = [
        text for text in (*comments, *texts) if isinstance(text, str) and " " in text
    ]
    assert [hit for text in prose for hit in _habits(text)] == []
    assert _VAGUE_ENTRY.findall(source) == []


def _prose(text: str) -> str:
    """Return a page's text on one line, without comments and code."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"\s+", " ", _CODE.sub("`...`", text))


def _habits(text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return the hits of the habits, each with the words around it and with a better phrase."""
    prose = _prose(text)
    for phrase in allowed:
        prose = prose.replace(phrase, "")
    return [
        f"...{prose[max(0, hit.start() - 40) : hit.end() + 40]}... (better: {better})"
        for habit, better in _HABITS.items()
        for hit in re.finditer(habit, prose, re.IGNORECASE)
    ]


def _text(page: Path) -> str:
    """Return the text of a page, or the Markdown of a notebook."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    )


@pytest.mark.parametrize(
    "page", [*_PAGES, *_NOTEBOOKS], ids=lambda page: page.relative_to(_ROOT).as_posix()
)
def test_prose_is_plain_english(page):
    assert (
        _habits(_text(page), _ALLOWED.get(page.relative_to(_ROOT).as_posix(), ())) == []
    )


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
        if subcommand == "lm-eval":  # passes on the options of another program
            continue
        shown = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)
        # The options of `fuse` depend on its method.
        method = (
            re.search(r" --method [a-z][a-z-]*", rest) if subcommand == "fuse" else None
        )
        text_of = _help(subcommand + (method[0] if method else ""))
        unknown += [
            f"{subcommand} {name}"
            for name in shown
            if not re.search(rf"{name}\b(?!-)", text_of)
        ]
    return unknown


@pytest.mark.parametrize(
    "page", _PAGES, ids=lambda page: page.relative_to(_ROOT).as_posix()
)
def test_commands_have_the_options_that_are_shown(page):
    text = page.read_text()
    assert not _unknown(text)
    scripts = re.findall(r"\b(?:experiments|benchmarks|examples|tests)/\w+\.py\b", text)
    assert [name for name in scripts if not (_ROOT / name).is_file()] == []
    targets = set(
        re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    assert (
        set(
            re.findall(r"(?:`|^    )(?:PYTHON=\S+ )?make ([a-z-]+)", text, re.MULTILINE)
        )
        <= targets
    )


@pytest.mark.parametrize("page", ["bases", "adapters"])
def test_every_row_of_a_table_of_tests_names_tests_that_exist(page):
    tables = re.findall(
        r"^\|.*\| test \|\n\|[-|]+\n((?:\|.*\n)+)",
        (_ROOT / f"docs/reference/{page}.md").read_text(),
        re.M,
    )
    rows = [row for table in tables for row in table.splitlines()]
    assert rows
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        assert [
            name
            for file, name in named
            if f"\ndef {name}(" not in (_ROOT / "tests" / file).read_text()
        ] == []


def test_a_command_with_an_unknown_option_is_found():
    assert _unknown(
        "`lorafusion fuse --seeds 1 --sweets 2`, `lorafusion fuse --seed 3`, lorafusion bake\n"
    ) == [
        "fuse --sweets",
        "fuse --seed",
        "bake",
    ]
    assert (
        _unknown("XLA_FLAGS=--xla_x=2 lorafusion fuse ... --mesh seed=2  # --not-one")
        == []
    )
