"""`lorafusion params`: the table it prints."""

from lorafusion_jax.cli import main
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.models.t5.config import SHAPES


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_it_prints_the_counts_as_a_markdown_table(capsys):
    main(["params", "--shape", "flan-t5-large", "--modules", "20", "--rank", "16"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert _cells(head) == ["method", "trainable numbers", "of flan-t5-large"]
    assert set(rule) == set("|-: ") and len({len(line) for line in (head, rule, *rows)}) == 1
    assert _cells(rows[0]) == ["LoRAFusion", "148,416", "0.01895 %"]
    wanted = counts(SHAPES["flan-t5-large"])
    assert [tuple(_cells(row)[:2]) for row in rows] == [(name, f"{count:,}") for name, count in wanted.items()]
