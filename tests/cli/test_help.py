"""Help texts of all subcommands: they render, group their options, and spell one thing in one way."""

import contextlib
import functools
import io
import re

import pytest

from lorafusion_jax.cli import COMMANDS, fuse, main
from lorafusion_jax.cli.parsing import flat_fields
from lorafusion_jax.runs.options import PRESETS

_SUBCOMMANDS = [*(name for name in COMMANDS if name != "crossbar"), "crossbar program"]


@functools.cache
def _help(subcommand: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main([*subcommand.split(), "--help"])
    assert stop.value.code == 0
    return printed.getvalue()


def _boxes(subcommand: str) -> dict[str, list[str]]:
    """Title -> options of every box of a help text."""
    found: dict[str, list[str]] = {}
    for line in _help(subcommand).splitlines():
        # Boxes are drawn only where the output is UTF-8.
        if title := re.match(r"(?:╭─| ) ?((?:\w+ )*)options\b(?: ─.*|\s*)$", line):
            found[title[1].strip()] = []
        elif option := re.match(r"(?:│ |  )(?:-h, )?--([a-z][a-z0-9-]*)", line):
            list(found.values())[-1].append(option[1])
    return found


def test_help_lists_the_subcommands(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    with pytest.raises(SystemExit, match="no subcommand 'fly': choose one of convert, fuse"):
        main(["fly"])


@pytest.mark.parametrize("subcommand", _SUBCOMMANDS)
def test_every_help_text_describes_every_option(subcommand):
    text = _help(subcommand)
    assert text.startswith(f"usage: lorafusion {subcommand} [-h]")
    bare = re.sub(r"[│\s]+", " ", text)
    options = [option for box in _boxes(subcommand).values() for option in box]
    assert options.pop(0) == "help" and options
    for option in options:
        between = re.search(rf" --{option}\b(.*?)\((default|required)", bare)
        assert between, option
        # Without the values that the option takes and its second name.
        said = re.sub(r"\{.*?\}|--[a-z0-9-]+|\b[A-Z]+\b", "", between[1])
        assert re.search(r"[a-z]{2,}", said), option


def test_fuse_shows_its_options_in_groups_and_the_common_ones_first():
    boxes = _boxes("fuse")
    assert list(boxes) == ["", "data and base", "fusion", "training", "baseline", "hardware", "run"]
    assert boxes[""] == ["help", "preset"]
    first = [options[0] for options in list(boxes.values())[1:]]
    assert first == ["base", "method", "epochs", "lora-rank", "crossbar", "seeds"]


def test_every_option_of_fuse_has_a_group():
    grouped = [name for names in fuse.GROUPS.values() for name in names]
    assert sorted([*grouped, "preset"]) == sorted(name for name, _, _ in flat_fields(fuse.FuseCommand))


@pytest.mark.parametrize(("preset", "composition"), [("default", "sum"), ("reference", "mix")])
def test_a_preset_sets_the_defaults_of_the_help_text(preset, composition, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fuse", f"--preset={preset}", "--help"])
    assert stop.value.code == 0
    assert f"(default: {composition})" in capsys.readouterr().out


def test_an_unknown_preset_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fuse", "--base", "base", "--task", "task", "--preset", "best"])
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "invalid choice 'best' for argument '--preset'. Expected one of ('default', 'reference')" in error


def test_presets_are_the_recipes_that_there_are():
    fields = {name: type_ for name, type_, _ in flat_fields(fuse.Preset)}
    assert fields["preset"].__args__ == tuple(PRESETS)
