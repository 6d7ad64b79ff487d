"""Tables in text."""

from refusals import refused

from lorafusion_jax.report import as_markdown as markdown
from lorafusion_jax.support.checks import at_least
from lorafusion_jax.support.text_tables import plain

_LINES = [["name", "count"], ["a", "1,000"], ["longer", "2"]]


def test_columns_are_as_wide_as_their_widest_cell():
    assert plain(_LINES).splitlines() == [
        "name    count",
        "a       1,000",
        "longer      2",
    ]
    assert plain(_LINES, left=(1,)).splitlines() == [
        "  name  count",
        "     a  1,000",
        "longer  2",
    ]


def test_a_cell_stays_on_its_line_of_a_terminal():
    lines = [["name", "count"], ["a\nb", "1"], ["c\x1b[2K\u2028d", "2"]]
    assert [line.split() for line in plain(lines).splitlines()] == [
        ["name", "count"],
        [r"a\nb", "1"],
        [r"c\x1b[2K\u2028d", "2"],
    ]


def test_a_markdown_table_is_ruled_by_the_alignment_of_its_columns():
    assert (
        markdown(_LINES)
        == "| name   | count |\n| ------ | ----: |\n| a      | 1,000 |\n| longer |     2 |\n"
    )


def test_a_count_below_the_least_is_named():
    at_least(1, chips=1, rows=None)
    with refused("^rows is 0: expected at least 1$"):
        at_least(1, chips=2, rows=0)
