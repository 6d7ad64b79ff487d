"""Model cards of names that strangers chose: any content of a name stays text."""

import ast
import re

import numpy as np
import one_block
import recipes

import lorafusion_jax as lf
from lorafusion_jax.runs import RunFolder
from lorafusion_jax.runs.card import write_card

_HOSTILE = '<img src=x onerror=run()> [free](http:evil) `|*"); import os; #\n# A title\n---\n\x1b[31m'


def _card(folder, options, modules, coefficients=None):
    run = RunFolder(folder / "run")
    with run.locked():
        run.write_config(
            recipes.run_config(options, modules=[modules], task_sha256=_HOSTILE)
        )
    config = lf.read_config(one_block.SMALL / "base")
    write_card(
        folder, run, options, 1, config, format="adapter", coefficients=coefficients
    )
    return (folder / "README.md").read_text()


def test_names_in_a_model_card_are_text(tmp_path):
    prompt = "````\n<script>\n```{input}"
    options = lf.FuseOptions(
        base=_HOSTILE, pool="pool", task=f"{_HOSTILE}.jsonl", prompt=prompt
    )
    coefficients = {"encoder.self.q": np.ones((2, 2, 1), np.float32)}
    card = _card(tmp_path, options, [_HOSTILE, "$\\frac$"], coefficients)

    front, card = card.removeprefix("---\n").split("\n---\n", 1)
    assert front == "tags:\n- lorafusion\n- lora\nlibrary_name: peft"
    assert "\x1b" not in card
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    (_, _, base, _) = ast.parse(code).body
    assert (
        ast.literal_eval(base.value.args[0])
        == _HOSTILE.replace("\x1b", "\\x1b").rpartition("/")[2]
    )
    assert f"\n`````text\n{prompt}\n`````\n" in card

    prose = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", card, flags=re.M | re.S)
    assert re.findall(r"^#+ .*", prose, re.M)[1:] == [
        "## Load it",
        "## Data",
        "## The pool",
    ]
    assert not re.search(r"(?<!\\)(<\w|\[free|`\|)", prose) and "\n---\n" not in prose
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(
        len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows
    )


def test_a_model_card_names_the_revision_of_the_base_and_a_control(tmp_path):
    options = lf.FuseOptions(
        base="org/base@v1.0", pool="pool", task="task.jsonl", control="rotated"
    )
    card = _card(tmp_path, options, ["module"])
    assert (
        "with the method `fusion`, the control `rotated` instead of the pool itself, and the seed 1"
        in card
    )
    assert "\nbase_model: org/base\n" in card
    assert 'from_pretrained("org/base", revision="v1.0")' in card
