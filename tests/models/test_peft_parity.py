"""Against PyTorch and PEFT themselves, on models made here: unequal depths, all linear maps, several ranks."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
import tiny
from flax import nnx
from peft_models import fused

import lorafusion_jax as lf
from lorafusion_jax.adapters.coefficients import expand
from lorafusion_jax.io.export import fused_adapter
from lorafusion_jax.parts import decoder_inputs, lora_adapter, write_adapter

pytestmark = pytest.mark.peft

_DECODER = r"decoder\.block\.\d+\.layer\.(0\.SelfAttention\.q|1\.EncDecAttention\.[ko]|2\.DenseReluDense\.wo)"
_ADAPTERS = {
    "everywhere": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": ["q", "v"], "use_rslora": True},
    "decoder": {"r": 4, "lora_alpha": 2, "target_modules": _DECODER},
    "small": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q", "v", "wi_0"],
        "rank_pattern": {"q": 1, "decoder.block.0.layer.0.SelfAttention.v": 5},
        "alpha_pattern": {"q": 4},
    },
    "dora": {"r": 3, "lora_alpha": 6, "target_modules": ["q", "o", "wi_1"], "use_dora": True},
}
_ONE_RANK = ("attention", "decoder")
_SEVERAL_RANKS = ("everywhere", "small", "patterns")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and adapters, as transformers and PEFT save them."""
    import peft

    folder = tmp_path_factory.mktemp("peft")
    peft_models.t5(feed_forward_proj="relu", tie_word_embeddings=True).save_pretrained(folder / "tied")
    (base := peft_models.t5()).save_pretrained(folder / "base")
    for name, fields in _ADAPTERS.items():
        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **fields)
        adapted = peft.get_peft_model(copy.deepcopy(base), config)
        peft_models.randomise(adapted).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def peft_logits(folder):
    """Logits of a base model, with an adapter if one is given, by transformers and PEFT."""
    import peft
    import torch
    import transformers

    def logits(base="base", adapter=None, prepare=None):
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder / base)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, folder / adapter)
        if prepare is not None:
            prepare(model)
        batch = tiny.batch()
        with torch.no_grad():
            said = model.eval()(
                input_ids=torch.tensor(np.array(batch.input_ids)),
                attention_mask=torch.tensor(np.array(batch.input_mask)),
                labels=torch.tensor(np.array(batch.labels, np.int64)),
            )
        return said.logits.numpy()

    return logits


@pytest.fixture(scope="module")
def base(folder):
    return lf.load_base(folder / "base")


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, weights, adapters):
    model, batch = nnx.merge(graph, weights), tiny.batch()
    return model(batch.input_ids, batch.input_mask, decoder_inputs(batch.labels, start_id=0, pad_id=0), adapters)


def _logits(model, adapters=None):
    return np.asarray(_run(*nnx.split(model), adapters or {}))


def _close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_dora_adapter_at_a_coefficient_is_peft_with_its_layers_scaled(folder, base, peft_logits):
    def scale(model):
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.6)

    method = lf.Fusion(composition="sum", granularity="global", magnitudes=False)
    adapters = fused(base, [folder / "dora"], method, 0.6).adapters
    theirs = peft_logits(adapter="dora", prepare=scale)
    assert np.abs(theirs - peft_logits(adapter="dora")).max() > 0.1
    _close(_logits(base, adapters), theirs)


@pytest.mark.parametrize(
    ("composition", "granularity", "magnitudes", "names"),
    [
        ("sum", "block", False, _SEVERAL_RANKS),
        ("sum", "rank", True, _SEVERAL_RANKS),
        ("sum", "site", True, _ONE_RANK),
        ("mix", "block", True, _ONE_RANK),
        ("mix", "rank", False, _ONE_RANK),
    ],
)
def test_exported_fusion_in_peft(folder, base, peft_logits, tmp_path, composition, granularity, magnitudes, names):
    method = lf.Fusion(composition=composition, granularity=granularity, magnitudes=magnitudes)
    found = fused(base, [folder / name for name in names], method)
    pool, magnitudes = found.frozen.pool, found.params.get("magnitudes")
    spread = expand(found.params["coefficients"], pool, granularity)
    adapter = fused_adapter(
        base.config, pool, jnp.arange(len(names)), spread, composition, base="base", magnitudes=magnitudes
    )
    write_adapter(tmp_path / "fused", *adapter)
    ours = _logits(base, found.adapters)
    assert np.abs(ours - _logits(base)).max() > 0.1
    _close(peft_logits(adapter=tmp_path / "fused"), ours)


def _trained_lora(model):
    adapted = {name: site for name, site in model.config.sites.items() if name.endswith((".o", "r.self.q"))}
    method = lf.LoRA(sites=tuple(adapted.items()), rank=3, alpha=5.0)
    frozen = lf.Frozen(nnx.split(model)[1])
    shapes = jax.eval_shape(method.init, frozen, jnp.arange(0), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape, np.float32)), shapes)
    return method.adapters(params, frozen, jnp.arange(0))[0]


def test_exported_lora_in_peft(base, peft_logits, tmp_path):
    adapters = _trained_lora(base)
    write_adapter(tmp_path / "lora", *lora_adapter(base.config, adapters, base="base"))
    ours = _logits(base, adapters)
    assert np.abs(ours - _logits(base)).max() > 0.1
    _close(peft_logits(adapter=tmp_path / "lora"), ours)


def test_merged_tied_base_in_transformers(folder, peft_logits, tmp_path):
    tied = lf.load_base(folder / "tied")
    adapters = _trained_lora(tied)
    lf.save_base(lf.merged_base(tied, adapters), tmp_path / "merged", folder / "tied")
    ours = _logits(tied, adapters)
    assert np.abs(ours - _logits(tied)).max() > 0.1
    _close(peft_logits(base=tmp_path / "merged"), ours)
