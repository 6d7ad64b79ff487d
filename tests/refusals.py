"""Input that is refused."""

import pytest

from lorafusion_jax import cli


def refused(words: str) -> pytest.RaisesExc:
    """Expect a ValueError whose message has words, a regular expression."""
    return pytest.raises(ValueError, match=words)


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command whose input is refused, and return its message."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    return capsys.readouterr().err
