"""Against PyTorch and PEFT themselves, on models made here: unequal depths, all linear maps, several ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

from lorafusion_jax.adapters.coefficients import expand
from lorafusion_jax.adapters.norms import gram
from lorafusion_jax.io.convert import ConvertOptions, convert
from lorafusion_jax.io.export import fused_adapter, lora_adapter, merged_base
from lorafusion_jax.io.hf import load_base, save_base
from lorafusion_jax.io.peft.adapter import read_adapter, resave, write_adapter
from lorafusion_jax.io.pool import ConvertedPool, read_pool
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.methods.lora import LoRA
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.models.t5.model import decoder_inputs
from lorafusion_jax.training.frozen import Frozen

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
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("peft")
    c = tiny.CONFIG
    torch.manual_seed(0)
    for name, kind in (("base", "gated-gelu"), ("tied", "relu")):
        config = transformers.T5Config(
            vocab_size=c.vocab_size, d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_heads=c.num_heads,
            num_layers=c.num_layers, num_decoder_layers=c.num_decoder_layers, feed_forward_proj=kind,
            tie_word_embeddings=name == "tied", decoder_start_token_id=0,
        )  # fmt: skip
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder / name)
    for name, fields in _ADAPTERS.items():
        base = transformers.T5ForConditionalGeneration.from_pretrained(folder / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **fields))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)
                elif "lora_magnitude_vector" in key:
                    parameter *= 1 + 0.3 * torch.rand_like(parameter)
        model.save_pretrained(folder / name)
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
    return load_base(folder / "base")


def _frozen(model, pool):
    return Frozen(nnx.state(model), pool, jax.jit(gram)(pool, {site: kernels(model)[site] for site in pool.A}))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, weights, adapters):
    model, batch = nnx.merge(graph, weights), tiny.batch()
    return model(batch.input_ids, batch.input_mask, decoder_inputs(batch.labels, start_id=0, pad_id=0), adapters)


def _logits(model, adapters=None):
    return np.asarray(_run(*nnx.split(model), adapters or {}))


def _fusion(folder, base, method, names):
    """Return a pool and a fusion of it at coefficients of either sign and changed magnitudes."""
    pool = read_pool([str(folder / name) for name in names], base.config)
    method.check(pool)
    frozen = _frozen(base, pool)
    index = jnp.arange(len(names))
    params = method.init(frozen, index, jax.random.key(0))
    params["coefficients"] = tiny.coefficients(params["coefficients"].shape)
    if method.magnitudes:
        factor = 1 + 0.3 * jax.random.uniform(jax.random.key(1), (base.config.d_ff,))
        params["magnitudes"] = {s: m * factor[None, : m.shape[1]] for s, m in params["magnitudes"].items()}
    adapters, _ = jax.jit(method.adapters)(params, frozen, index)
    return pool, params, adapters


def _close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_dora_adapter_at_a_coefficient_is_peft_with_its_layers_scaled(folder, base, peft_logits):
    def scale(model):
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.6)

    method = Fusion(composition="sum", granularity="global", magnitudes=False)
    pool = read_pool([str(folder / "dora")], base.config)
    coefficients = {"coefficients": jnp.array([0.6])}
    adapters, _ = jax.jit(method.adapters)(coefficients, _frozen(base, pool), jnp.arange(1))
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
    method = Fusion(composition=composition, granularity=granularity, magnitudes=magnitudes)
    pool, params, adapters = _fusion(folder, base, method, names)
    spread = expand(params["coefficients"], pool, granularity)
    config, tensors = fused_adapter(
        base.config,
        pool,
        jnp.arange(len(names)),
        spread,
        composition,
        base="base",
        magnitudes=params.get("magnitudes"),
    )
    write_adapter(tmp_path / "fused", config, tensors)
    ours = _logits(base, adapters)
    assert np.abs(ours - _logits(base)).max() > 0.1
    _close(peft_logits(adapter=tmp_path / "fused"), ours)


def _trained_lora(model):
    adapted = {name: site for name, site in model.config.sites.items() if name.endswith((".o", "r.self.q"))}
    method = LoRA(sites=tuple(adapted.items()), rank=3, alpha=5.0)
    frozen = Frozen(nnx.split(model)[1])
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
    tied = load_base(folder / "tied")
    adapters = _trained_lora(tied)
    save_base(merged_base(tied, adapters), tmp_path / "merged", folder / "tied")
    ours = _logits(tied, adapters)
    assert np.abs(ours - _logits(tied)).max() > 0.1
    _close(peft_logits(base=tmp_path / "merged"), ours)


@pytest.mark.parametrize("name", _ADAPTERS)
def test_resaved_adapter_is_the_source(folder, tmp_path, name):
    resave(read_adapter(str(folder / name)), tmp_path / "direct")
    convert(ConvertOptions(base=str(folder / "base"), adapters=(str(folder / name),), out=tmp_path / "pool"))
    resave(ConvertedPool(tmp_path / "pool").adapter(name), tmp_path / "through a pool")
    wanted = load_file(folder / name / "adapter_model.safetensors")
    for again in ("direct", "through a pool"):
        tensors = load_file(tmp_path / again / "adapter_model.safetensors")
        assert tensors.keys() == wanted.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == wanted[key].dtype
            np.testing.assert_array_equal(tensor, wanted[key])
        config = (folder / name / "adapter_config.json").read_bytes()
        assert (tmp_path / again / "adapter_config.json").read_bytes() == config
