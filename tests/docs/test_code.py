"""Every code block of the README and of the pages runs, in order, in one folder and one namespace a page.

Comments that readers do not see, on the lines before a block, say how a test runs it:

    <!-- test: skip, REASON -->       not at all
    <!-- test: OLD => NEW -->         with NEW in place of OLD, which makes it small

A page with `<!-- test: after the README -->` somewhere starts with the pool and the run that the README's commands
write. One with `<!-- test: needs MODULE -->` is skipped where the module is not installed.
"""

import contextlib
import dataclasses
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import one_block
import pytest

from lorafusion_jax import cli

_ROOT = Path(__file__).resolve().parents[2]
_README = _ROOT / "README.md"
_PAGES = [_ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").rglob("*.md"))]
_AFTER_README = "after the README"
# Other tests cover what these pages show.
_NIGHTLY = (
    "flax.md",
    "flax_training.md",
    "python.md",
    "decoders.md",
    "serving.md",
)
_LONG = ("cost.md", "crossbar.md", "crossbar_devices.md", "reads.md")


def _tier(page):
    if page.name in _NIGHTLY:
        return (pytest.mark.nightly,)
    needs_run = f"<!-- test: {_AFTER_README} -->" in page.read_text()
    return (pytest.mark.long,) if needs_run or page.name in _LONG else ()


_WITH_CODE = [
    pytest.param(page, marks=_tier(page))
    for page in _PAGES
    if re.search("^```(bash|python)$", page.read_text(), re.MULTILINE)
]
_NEEDS = re.compile(r"<!-- test: needs (\w+) -->")

_RUN = ("bash", "python")
_SHOWN = ("text", "yaml", "json", "bibtex", "math")
_BLOCK = re.compile(
    r"((?:^<!-- test: [^\n]* -->\n)*)^(```+)([^\n]*)\n(.*?)^\2 *$",
    re.MULTILINE | re.DOTALL,
)
_SETTING = re.compile(r"<!-- test: (.*) -->")
_BETWEEN_LINES = re.compile(
    r'\n(?=(?:[^"]*"[^"]*")*[^"]*$)'
)  # a text in quotes may have several
_INDENTED = re.compile(r"(?:\A|\n)\n    [^ *\-\n|].*")


@dataclasses.dataclass(frozen=True)
class _Block:
    """A fenced block: its language, its text as a test runs it, its first line, and why it is skipped, if it is."""

    language: str
    text: str
    line: int
    skipped: str | None = None


def _blocks(page):
    """Yield the blocks of a page's text; a directive of Sphinx, as {toctree}, is not code."""
    for found in _BLOCK.finditer(page):
        settings, _, language, text = found.groups()
        skipped = None
        for setting in _SETTING.findall(settings):
            if setting == _AFTER_README or setting.startswith("needs "):
                continue
            if setting.startswith("skip, "):
                skipped = setting.removeprefix("skip, ")
            else:
                old, arrow, new = setting.partition(" => ")
                assert arrow, (
                    f"a comment for tests is neither 'skip, REASON' nor 'OLD => NEW': {setting}"
                )
                assert old in text, (
                    f"a comment for tests replaces what is not in its block: {old}"
                )
                text = text.replace(old, new)
        if not language.startswith("{"):
            yield _Block(language, text, page[: found.start(4)].count("\n"), skipped)


def _run_shell(text, monkeypatch):
    """Run each line: `lorafusion ...`, `echo TEXT | lorafusion ...`, or `python SCRIPT ...`, all in this process."""
    for line in _BETWEEN_LINES.split(text.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if words[:1] == ["echo"]:
            pipe = words.index("|")
            monkeypatch.setattr(
                sys, "stdin", io.StringIO(" ".join(words[1:pipe]) + "\n")
            )
            words = words[pipe + 1 :]
        arguments = [
            name
            for word in words[1:]
            for name in (sorted(map(str, Path().glob(word))) or [word])
        ]
        if words[:1] == ["lorafusion"]:
            cli.main(arguments)
        elif words[:1] == ["python"]:
            monkeypatch.setattr(sys, "argv", arguments)
            monkeypatch.syspath_prepend(str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            assert not words, (
                f"a test cannot run this line; skip its block and say why: {line}"
            )


def _run_page(page, monkeypatch):
    namespace = {"__name__": "page"}
    for block in _blocks(page.read_text()):
        if block.skipped:
            continue
        if block.language == "bash":
            _run_shell(block.text, monkeypatch)
        elif block.language == "python":
            # The lines of an error are those of the page.
            exec(compile("\n" * block.line + block.text, page, "exec"), namespace)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return one_block.examples(tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def after_readme(examples, tmp_path_factory):
    """Return the folder that the README's blocks have run in."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(examples)
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(folder):
        _run_page(_README, monkeypatch)
    return folder


@pytest.mark.long
def test_the_readme_converts_fuses_evaluates_and_exports(after_readme):
    for written in (
        "pool/manifest.json",
        "runs/pairswap_numvow-fusion/results.json",
        "adapter/adapter_config.json",
    ):
        assert (after_readme / written).is_file()


@pytest.mark.parametrize(
    "page", _WITH_CODE, ids=lambda page: page.relative_to(_ROOT).as_posix()
)
def test_the_code_of_a_page_runs(page, examples, request, tmp_path, monkeypatch):
    for module in _NEEDS.findall(page.read_text()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}, which the page says how to install")
    if f"<!-- test: {_AFTER_README} -->" in page.read_text():
        readme = request.getfixturevalue("after_readme")
        for name in ("pool", "runs"):
            shutil.copytree(readme / name, tmp_path / name)
        for config in (tmp_path / "runs").glob(
            "*/config.json"
        ):  # a run records where its pool is
            config.write_text(config.read_text().replace(str(readme), str(tmp_path)))
    (tmp_path / "examples").symlink_to(examples)
    (tmp_path / "experiments").symlink_to(_ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    _run_page(page, monkeypatch)


@pytest.mark.long
def test_the_code_of_pages_has_types(tmp_path):
    # The types of `convert`: an `Any` accepts all that the pages do with it.
    for name, last in {
        **dict.fromkeys(
            ("crossbar.md", "crossbar_devices.md", "decoders.md", "flax.md"), ""
        ),
        "flax_training.md": "assert_type(crossbar_flax.convert(model, {}, jax.random.key(0)), nnx.Sequential)",
    }.items():
        page = (_ROOT / "docs/guides" / name).read_text()
        code = [
            block.text
            for block in _blocks(page)
            if block.language == "python" and not block.skipped
        ]
        (tmp_path / f"page_{Path(name).stem}.py").write_text(
            "".join([*code, "from typing import assert_type\n", last])
        )
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    command = [
        Path(sys.executable).with_name("basedpyright"),
        "--pythonpath",
        sys.executable,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "page", [_README, *_PAGES], ids=lambda page: page.relative_to(_ROOT).as_posix()
)
def test_every_block_names_its_language_and_is_narrow(page):
    text = page.read_text()
    assert {block.language for block in _blocks(text)} <= {*_RUN, *_SHOWN}
    assert _INDENTED.findall(_BLOCK.sub("", text)) == []
    blocks = re.findall(
        r"^```(?:bash|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    assert [
        line for block in blocks for line in block.splitlines() if len(line) > 90
    ] == []
