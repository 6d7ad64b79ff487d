"""`lorafusion generate` as it is typed: a base model without a run, and drawn tokens that are printed as they come."""

import functools
import io
import json
import subprocess
import sys

import pytest

from lorafusion_jax import cli
from lorafusion_jax.cli import generate


class _Out(io.StringIO):
    """Standard output that records how much of it was flushed."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def test_streamed_text_is_the_printed_text_piece_by_piece(
    base, tmp_path, capsys, monkeypatch
):
    (tmp_path / "lines").write_text("hot\nthe tall one\n")
    command = (
        f"generate --base {base} --chat --file {tmp_path / 'lines'} --max-new-tokens 12"
        " --temperature 2 --top-k 300 --top-p 0.99 --sampling-seed 3"
    ).split()
    cli.main(command)
    printed = capsys.readouterr().out
    assert printed.endswith("\n") and len(printed) > 20
    out = _Out()
    monkeypatch.setattr("sys.stdout", out)
    (tmp_path / "lines").write_text(
        "hot\nthe tall one\n", encoding="utf-8-sig"
    )  # a mark that is no text
    cli.main([*command, "--stream"])
    assert out.getvalue() == printed
    assert all(
        later.startswith(earlier)
        for earlier, later in zip(out.flushed, out.flushed[1:], strict=False)
    )
    assert len(out.flushed) > 8


@pytest.mark.parametrize("how", [["--base"], ["--base", "--stream"], ["--runs"]])
def test_every_answer_is_one_line_and_a_json_string_has_its_text(
    how, tmp_path, capsys, monkeypatch
):
    said = ["a\nb", "c\r\u2028d\te\x1b é"]
    monkeypatch.setattr(
        generate, "stream_lines", lambda *_: (iter(answer) for answer in said)
    )
    monkeypatch.setattr(generate, "generate_lines", lambda *_: said)
    rows = functools.wraps(generate.generate_rows)(lambda **_: said)
    monkeypatch.setattr(generate, "generate_rows", rows)
    cli.main(["generate", how[0], ".", *how[1:]])
    assert capsys.readouterr().out == "a\\nb\nc\\r\\u2028d\te\x1b é\n"
    cli.main(["generate", how[0], ".", *how[1:], "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == said


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_standard_stream_that_is_closed_is_an_empty_one(
    base, stream, tmp_path, monkeypatch
):
    (tmp_path / "lines").write_text("hot\n")
    monkeypatch.setattr(sys, stream, None)  # as Python has it then
    command = f"generate --base {base} --max-new-tokens 2".split()
    if stream == "stdin":
        with pytest.raises(SystemExit, match="2"):  # there is no line to answer
            cli.main(command)
    else:
        cli.main([*command, "--file", str(tmp_path / "lines")])
    getattr(sys, stream).close()


def test_files_do_not_get_the_numbers_of_closed_streams():
    code = "import sys; from lorafusion_jax import cli; cli.main([]); sys.exit(open('/dev/null').fileno() < 3)"
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
