"""Input that is refused."""

import pytest

from lorafusion_jax import cli


def refused(words):
    """Expect a ValueError whose message has words, a regular expression."""
    return pytest.raises(ValueError, match=words)


def refusals(rows):
    """Make a test of a table: calls that are refused, each with words of its message."""

    @pytest.mark.parametrize(("call", "words"), rows, ids=range(len(rows)))
    def test(call, words):
        with refused(words):
            call()

    return test


def told(capsys, arguments):
    """Run a command whose input is refused, and return its message."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    return capsys.readouterr().err
