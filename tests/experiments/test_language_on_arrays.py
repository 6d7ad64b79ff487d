"""Perplexity on arrays, on a small Llama and texts made up here."""

import json

import jax.numpy as jnp
import language_on_arrays
import numpy as np
import pytest
import small_llama
from refusals import refused

from lorafusion_jax import load_base, load_tokenizer

_WORDS = "the cold bold gold is old and the tall wall is small "


@pytest.fixture
def script(monkeypatch, tmp_path):
    llama = small_llama.make(tmp_path / "llama")
    (texts := tmp_path / "text").mkdir()
    (texts / "calibration.txt").write_text(2 * _WORDS)
    (texts / "a.txt").write_text(_WORDS)
    (texts / "b.txt").write_text("Q: hot\nA: cold\n")
    for name, value in (
        ("base", lambda: llama),
        ("TEXTS", texts),
        ("WINDOW", 8),
        ("BATCH", 2),
    ):
        monkeypatch.setattr(language_on_arrays, name, value)
    return language_on_arrays


@pytest.mark.nightly
def test_rows_of_perplexity_by_setting(script, tmp_path):
    given = f"--out {tmp_path / 'out'} --calibration-tokens 16 --tokens 20 --errors 0".split()
    script.main([*given, "--bits", "ideal", "8"])
    file = tmp_path / "out" / "rows.jsonl"
    first = file.read_text()
    digital, ideal, lossless = map(json.loads, first.splitlines())
    assert (digital["bits"], ideal["bits"], lossless["bits"]) == (None, "ideal", 8)
    assert digital["tokens"] == 3 * 7 and len(digital["window_losses"]) == 3

    # The loss of three windows, from the model's logits.
    model = load_base(str(script.base()))
    tokenizer = load_tokenizer(str(script.base()))
    text = "\n".join((script.TEXTS / name).read_text() for name in ("a.txt", "b.txt"))
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"][:24]).reshape(
        3, 8
    )
    logits = np.asarray(model(jnp.asarray(ids), jnp.ones_like(ids, bool)), float)[
        :, :-1
    ]
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=2)) - chosen
    np.testing.assert_allclose(digital["window_losses"], losses.mean(axis=1), rtol=1e-5)
    assert digital["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    # Columns of 24 rows sum up to at most 72 levels, which 8 bits tell apart; 8-bit weights and inputs remain.
    assert lossless["loss"] == pytest.approx(ideal["loss"], rel=1e-6)
    assert lossless["paths"] == ideal["paths"] == ["product"] and "paths" not in digital
    assert ideal["loss"] != digital["loss"] and ideal["loss"] == pytest.approx(
        digital["loss"], rel=1e-2
    )

    script.main([*given, "--bits", "8", "3"])
    assert file.read_text().startswith(first)
    coarse = json.loads(file.read_text().splitlines()[-1])
    assert coarse["bits"] == 3 and abs(coarse["loss"] - ideal["loss"]) > 10 * abs(
        lossless["loss"] - ideal["loss"]
    )
    assert (
        (tmp_path / "out" / "perplexity.csv")
        .read_text()
        .splitlines()[1]
        .startswith("0,")
    )
    assert (tmp_path / "out" / "perplexity.png").exists()
    with refused(r"holds other rows \(tokens was 21, is 14\): give another --out"):
        script.main([*given[:-4], *"--tokens 16 --errors 0".split()])
    with refused(r"--tokens is 8000 tokens, and .* has \d+: give 1 to"):
        script.main(["--out", str(tmp_path / "other"), "--tokens", "8000"])
