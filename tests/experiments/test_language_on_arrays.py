"""Perplexity on arrays, on a small Llama and texts made up here."""

import jax.numpy as jnp
import language_on_arrays
import numpy as np
import pytest
import small_llama
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax import load_base, load_tokenizer
from lorafusion_jax.trials import read_lines

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
    out = tmp_path / "out"
    command = f"--out {out} --calibration-tokens 16 --errors 0"
    script.main(f"{command} --tokens 20 --bits ideal 8 3".split())
    digital, ideal, lossless, coarse = read_lines(out / "rows.jsonl")
    bits = [row["bits"] for row in (digital, ideal, lossless, coarse)]
    assert bits == [None, "ideal", 8, 3]
    # The loss of three windows, from the model's logits.
    model = load_base(str(script.base()))
    tokenizer = load_tokenizer(str(script.base()))
    text = "\n".join((script.TEXTS / name).read_text() for name in ("a.txt", "b.txt"))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:24]
    ids = np.array(tokens).reshape(3, 8)
    logits = np.asarray(model(jnp.asarray(ids), jnp.ones_like(ids, bool)), float)
    chosen = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    losses = np.log(np.exp(logits[:, :-1]).sum(axis=2)) - chosen
    assert_allclose(digital["window_losses"], losses.mean(axis=1), rtol=1e-5)
    # Columns of 24 rows sum up to at most 72 levels, which 8 bits tell apart; 8-bit weights and inputs remain.
    assert lossless["loss"] == pytest.approx(ideal["loss"], rel=1e-6)
    assert ideal["loss"] != digital["loss"]
    assert ideal["loss"] == pytest.approx(digital["loss"], rel=1e-2)
    assert abs(coarse["loss"] - ideal["loss"]) > 10 * abs(
        lossless["loss"] - ideal["loss"]
    )
    assert (out / "perplexity.csv").read_text().splitlines()[1].startswith("0,")
    assert (out / "perplexity.png").exists()
    with refused(r"holds other rows \(tokens was 21, is 14\): give another --out"):
        script.main(f"{command} --tokens 16".split())
