"""Help texts of all subcommands: they describe their options in groups, and wrong options are refused."""

import contextlib
import functools
import io
import re

import pytest

from lorafusion_jax import PRESETS
from lorafusion_jax.cli import COMMANDS, main
from lorafusion_jax.methods import METHODS, fields_of

_NUMBERS = {name for entry in METHODS.values() for name in fields_of(entry)}
_SUBCOMMANDS = [*(name for name in COMMANDS if name != "crossbar"), "crossbar program"]


@functools.cache
def _help(subcommand):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main([*subcommand.split(), "--help"])
    assert stop.value.code == 0
    return printed.getvalue()


def _boxes(subcommand):
    """Title -> options of every box of a help text."""
    found = {}
    for line in _help(subcommand).splitlines():
        # Boxes are drawn only where the output is UTF-8.
        if title := re.match(r"(?:╭─| ) ?((?:[\w-]+ )*)options\b(?: ─.*|\s*)$", line):
            found[title[1].strip()] = []
        elif option := re.match(r"(?:│ |  )(?:-h, )?--([a-z][a-z0-9-]*)", line):
            list(found.values())[-1].append(option[1])
    return found


def test_help_lists_the_subcommands(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    with pytest.raises(
        SystemExit, match="no subcommand 'fly': choose one of trial, convert, fuse"
    ):
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


def test_options_are_shown_in_groups_and_the_common_ones_first():
    boxes = _boxes("fuse")
    assert list(boxes) == [
        "",
        "data and base",
        "method",
        "method fusion",
        "training",
        "generation",
        "hardware",
        "plan",
        "run",
    ]
    assert boxes[""] == ["help", "preset"]
    first = [options[0] for options in list(boxes.values())[1:]]
    assert first == [
        "base",
        "method",
        "modules",
        "epochs",
        "max-new-tokens",
        "crossbar",
        "plan",
        "seeds",
    ]
    assert list(_boxes("evaluate")) == ["", "data and base", "hardware", "run"]


@pytest.mark.parametrize("method", METHODS)
def test_fuse_shows_the_options_of_the_chosen_method(method):
    boxes = _boxes(f"fuse --method {method}")
    numbers = {
        option.replace("-", "_") for box in boxes.values() for option in box
    } & _NUMBERS
    assert numbers == set(fields_of(METHODS[method]))
    assert all(boxes.values()) and len(boxes[""]) == 2  # every other option has a group


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "fuse --base . --task . --lora-rank 4",
            "--lora-rank is an option of the methods lora, dora, not of fusion",
        ),
        (
            "fuse --base . --task . --preset best",
            "invalid choice 'best' for argument '--preset'. Expected one of (",
        ),
        (
            "crossbar --run .",
            "`lorafusion crossbar` has the actions prepare, program and explore",
        ),
    ],
)
def test_options_of_other_methods_and_other_values_are_refused(
    command, message, capsys
):
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("preset", "composition"), [*zip(PRESETS, ("sum", "mix"), strict=True)]
)
def test_a_preset_sets_the_defaults_of_the_help_text(preset, composition, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fuse", f"--preset={preset}", "--help"])
    assert stop.value.code == 0
    assert f"(default: {composition})" in capsys.readouterr().out
