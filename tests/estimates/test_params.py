"""Trainable counts: the published sizes, the code that trains, and PEFT."""

import jax
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.cli import main
from lorafusion_jax.estimates import shape_config
from lorafusion_jax.estimates.params import counts, size
from lorafusion_jax.models import known_shapes

_LARGE = {
    "LoRAFusion": 148_416,
    "LoRAFusion, basis of 32": 148_416,
    "LoRAFusion, coefficients only": 960,
    "LoRAFusion, magnitudes only": 147_456,
    "LoRA, rank 16": 4_718_592,
    "DoRA, rank 16": 4_866_048,
    "VeRA, rank 128": 165_888,
    "LoraHub": 20,
    "full fine-tuning": 783_150_080,
}
# What transformers counts in the models of the hub.
_SIZES = {
    **{
        "flan-t5-small": 76_961_152,
        "flan-t5-base": 247_577_856,
        "flan-t5-large": 783_150_080,
    },
    **{"flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352},
    **{"t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096},
}


def test_the_command_prints_the_counts_as_a_markdown_table(capsys):
    assert counts(known_shapes()["flan-t5-large"]) == _LARGE
    assert {name: size(known_shapes()[name]) for name in _SIZES} == _SIZES
    main("params --shape flan-t5-large --modules 20 --rank 16".split())
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    )
    assert head == ["method", "trainable parameters", "of flan-t5-large"]
    assert rows[0] == ["LoRAFusion", "148,416", "0.01895 %"]
    assert [tuple(row[:2]) for row in rows] == [
        (name, f"{count:,}") for name, count in _LARGE.items()
    ]


def test_a_folder_with_the_config_of_transformers_4_or_5(goldens, tmp_path):
    folder = goldens / "fusion" / "t5a" / "base"
    held = sum(leaf.size for leaf in jax.tree.leaves(lf.load_base(folder)))
    for config in ("config.json", "config.transformers5.json"):
        (tmp_path / "config.json").write_bytes((folder / config).read_bytes())
        found = counts(shape_config(str(tmp_path)), modules=4)
        assert (found["full fine-tuning"], found["LoraHub"]) == (held, 4)


def test_models_and_numbers_without_counts_are_refused():
    with refused(
        "no shape 'flan-t5-huge': give a folder, hub id, GGUF file or one of flan-t5-small"
    ):
        shape_config("flan-t5-huge")
    for changes, message in (
        (
            {"targets": ("q", "q_proj")},
            "targets are q q_proj: choose of q k v o wi_0 wi_1 wo",
        ),
        ({"targets": ()}, "targets are none"),
        ({"basis": 0}, "basis is 0"),
        (
            {"basis": 1025},
            "1025 directions, but encoder.self.q is 1024 x 1024: use at most 1024",
        ),
    ):
        with refused(message):
            counts(known_shapes()["flan-t5-large"], **changes)
