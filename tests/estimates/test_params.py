"""Trainable counts: the published sizes, the code that trains, and PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.cli import main
from lorafusion_jax.estimates.params import counts, size
from lorafusion_jax.parts import FullFineTuning, Magnitudes, T5Config, VeRA, abstract_model, known_shapes, shape_config

_LARGE = {
    "LoRAFusion": 148_416,
    "LoRAFusion, basis of 32": 148_416,
    "LoRAFusion, basis of 32, with a core": 148_416 + 144 * 32**2,
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
    **{"flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856, "flan-t5-large": 783_150_080},
    **{"flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352},
    **{"t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096},
}
# Unequal stacks, and attention whose inner width is not d_model.
_UNEQUAL = T5Config(vocab_size=32, d_model=24, d_kv=4, d_ff=40, num_heads=4, num_layers=3, num_decoder_layers=2)
_TARGETS = [("q", "v"), ("q", "k", "v", "o", "wi_0", "wi_1", "wo")]
_COUNTS = {"modules": 5, "rank": 3, "vera_rank": 7, "basis": 6}


def test_the_command_prints_the_counts_as_a_markdown_table(capsys):
    assert counts(known_shapes()["flan-t5-large"]) == _LARGE
    assert {name: size(known_shapes()[name]) for name in _SIZES} == _SIZES
    main(["params", "--shape", "flan-t5-large", "--modules", "20", "--rank", "16"])
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    assert head == ["method", "trainable parameters", "of flan-t5-large"]
    assert rows[0] == ["LoRAFusion", "148,416", "0.01895 %"]
    assert [tuple(row[:2]) for row in rows] == [(name, f"{count:,}") for name, count in _LARGE.items()]


def test_counts_equal_the_numbers_that_methods_train():
    targets = ("q", "o", "wi_0", "wo")  # matrices of every shape
    adapted = {n: site for n, site in _UNEQUAL.sites.items() if n.rpartition(".")[2] in targets}
    pool = lf.LoraPool(
        A={n: jnp.asarray(np.ones((s.layers, 5, s.d_in, 3), np.float32)) for n, s in adapted.items()},
        B={n: jnp.asarray(np.ones((s.layers, 5, 3, s.d_out), np.float32)) for n, s in adapted.items()},
        rank={n: jnp.asarray(np.full((s.layers, 5), 3, np.int32)) for n, s in adapted.items()},
        names=tuple("abcde"),
    )
    gram = lf.Gram({n: jnp.ones((s.layers, s.d_out)) for n, s in adapted.items()}, {})
    base = jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape, a.dtype)), nnx.state(abstract_model(_UNEQUAL)))
    frozen, index, key = lf.Frozen(base, pool, gram, norms=gram.squared), jnp.arange(5), jax.random.key(0)
    adapted_sites = tuple(adapted.items())
    methods = {
        "LoRAFusion": lf.Fusion(),
        "LoRAFusion, basis of 6": lf.Fusion(basis=6),
        "LoRAFusion, basis of 6, with a core": lf.Fusion(basis=6, core=True),
        "LoRAFusion, coefficients only": lf.Fusion(magnitudes=False),
        "LoRAFusion, magnitudes only": Magnitudes(),
        "LoRA, rank 3": lf.LoRA(sites=adapted_sites, rank=3),
        "DoRA, rank 3": lf.LoRA(sites=adapted_sites, rank=3, dora=True),
        "VeRA, rank 7": VeRA(sites=adapted_sites, rank=7),
        "full fine-tuning": FullFineTuning(),
        "LoraHub": lf.Fusion(composition="mix", granularity="global", magnitudes=False),
    }
    found = counts(_UNEQUAL, **_COUNTS, targets=targets)
    in_basis = dataclasses.replace(frozen, pool=lf.shared_basis(pool, 6))
    for name, method in methods.items():
        of = in_basis if "basis" in name else frozen
        acting = jax.jit(lambda of, method=method: method.trainable(method.init(of, index, key), of, index))(of)
        assert found[name] == sum(int(np.sum(a)) for a in jax.tree.leaves(acting)), name


@pytest.mark.peft
@pytest.mark.parametrize("targets", _TARGETS)
def test_counts_are_pefts(targets):
    import peft
    import transformers

    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    sizes = {name: getattr(_UNEQUAL, name) for name in names}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

    def trained(adapter=None) -> int:
        model = transformers.T5ForConditionalGeneration(config)
        if adapter is not None:
            model = peft.get_peft_model(model, adapter)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    modules = list(targets)
    found = counts(_UNEQUAL, **_COUNTS, targets=targets)
    assert found["LoRA, rank 3"] == trained(peft.LoraConfig(r=3, target_modules=modules))
    assert found["DoRA, rank 3"] == trained(peft.LoraConfig(r=3, target_modules=modules, use_dora=True))
    if targets == ("q", "v"):  # VeRA's shared matrices need one shape for all
        assert found["VeRA, rank 7"] == trained(peft.VeraConfig(r=7, target_modules=modules))


def test_a_folder_with_the_config_of_transformers_4_or_5(goldens, tmp_path):
    folder = goldens / "fusion" / "t5a" / "base"
    held = sum(leaf.size for leaf in jax.tree.leaves(lf.load_base(folder)))
    for config in ("config.json", "config.transformers5.json"):
        (tmp_path / "config.json").write_bytes((folder / config).read_bytes())
        found = counts(shape_config(str(tmp_path)), modules=4)
        assert (found["full fine-tuning"], found["LoraHub"]) == (held, 4)


def test_models_and_numbers_without_counts_are_refused():
    with pytest.raises(
        ValueError, match="no shape 'flan-t5-huge': give a folder, hub id, GGUF file or one of flan-t5-small"
    ):
        shape_config("flan-t5-huge")
    for changes, message in (
        ({"targets": ("q", "q_proj")}, "targets are q q_proj: choose of q k v o wi_0 wi_1 wo"),
        ({"targets": ()}, "targets are none"),
        ({"modules": 0}, "modules is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"basis": 0}, "basis is 0"),
        ({"basis": 1025}, "1025 directions, but encoder.self.q is 1024 x 1024: use at most 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            counts(known_shapes()["flan-t5-large"], **changes)
