"""Input that is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lorafusion_jax import cli


def refused(words: str) -> pytest.RaisesExc:
    """Expect a ValueError whose message has words, a regular expression."""
    return pytest.raises(ValueError, match=words)


def refusals(
    rows: Sequence[tuple[Callable[[], Any], str]],
) -> Callable[[Callable[[], Any], str], None]:
    """Make a test of a table: calls that are refused, each with words of its message."""

    @pytest.mark.parametrize(("call", "words"), rows, ids=range(len(rows)))
    def test(call: Callable[[], Any], words: str) -> None:
        with refused(words):
            call()

    return test


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command whose input is refused, and return its message."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    return capsys.readouterr().err
