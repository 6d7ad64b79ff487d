"""`lorafusion crossbar explore` on a small T5."""

import json

import pytest
import recipes

from lorafusion_jax import crossbar
from lorafusion_jax.cli import main

_LINES = [
    json.loads(row)["context"]
    for row in (recipes.TASK / "train.jsonl").read_text().splitlines()
]


def _arguments(small, folder, *more):
    (folder / "lines.txt").write_text("\n".join(_LINES[:16] * 6))
    device = crossbar.CrossbarConfig(
        cell=crossbar.Cell(bits=(7,)),
        dac=crossbar.DAC(bits=6, slice_bits=5),
        device=crossbar.Device(programming=crossbar.Independent(0.05)),
    )
    crossbar.save_config(device, folder / "mine.yaml")
    files = f"--text {folder}/lines.txt --device {folder}/mine.yaml --out {folder}/out"
    digital = "--keep-digital head *.ff.* decoder.* *.[kvo]"
    command = f"crossbar explore --base {small[0]} {files} {digital}"
    return [*command.split(), *more]


@pytest.mark.long
def test_a_base_is_explored_and_the_best_is_prepared(small, tmp_path, capsys):
    arguments = _arguments(small, tmp_path, "--vary", "adc.bits=6", "--loss")
    main([*arguments, "5"])
    output = capsys.readouterr().out
    assert "adc.bits=6 is the cheapest that loses less than 5 nats" in output
    assert (tmp_path / "out" / "front.png").exists()
    assert crossbar.load_config(tmp_path / "out" / "best.yaml").adc.bits == 6
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    (prepared,) = (tmp_path / "out").glob("prepared-*")
    assert str(prepared) in output
    with pytest.raises(SystemExit, match="^1$"):
        main([*arguments, "1e-9"])
    assert "No configuration loses less than 1e-09 nats" in capsys.readouterr().out
    assert (tmp_path / "out" / "rows.jsonl").read_text().startswith(rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vary", "adc.bitz=4"], "adc.bitz is unknown"),
        (["--vary", "tile.rows=64"], "adc = None is an ideal converter"),
        (["--loss", "0"], "loss is 0.0: give nats above 0"),
        (["--device", "{folder}/other.yaml"], "cels is unknown: choose from cell"),
        (["--text", "{folder}/short.txt"], "1 batches of 16 lines: give at least 6"),
        (["--keep-digital", "*"], "leave none for arrays"),
    ],
)
def test_bad_explorations_write_nothing(small, tmp_path, capsys, more, message):
    arguments = _arguments(small, tmp_path, *(m.format(folder=tmp_path) for m in more))
    (tmp_path / "other.yaml").write_text("cels: {bits: [7]}")
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
