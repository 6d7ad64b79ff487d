"""A small T5 of unequal depths, pools for it, and what tests of models without pretrained weights share."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from safetensors.numpy import save_file

import lorafusion_jax as lf
from lorafusion_jax.models import T5, T5Config, linear_shapes
from lorafusion_jax.models.registry import family_of_json

CONFIG = T5Config(
    vocab_size=48,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_heads=3,
    num_layers=3,
    num_decoder_layers=2,
)


def somewhere(n, site, layer):
    """The rank of adapter n at a site in a layer, 4 or 0 where it has none.

    Module 0 has nothing in the decoder and module 2 nothing in the encoder's last layer.
    """
    return (
        0
        if (n == 0 and "decoder" in site)
        or (n == 2 and site.startswith("encoder") and layer == 2)
        else 4
    )


def write_base(folder, config, draw):
    """Write a base without a tokenizer: weights are what `draw` makes of a tensor's name and shape."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    family = family_of_json(config)
    model = family.abstract(family.read_config(config))
    checkpoint = family.checkpoint(model.config)
    tensors = {
        name: draw(name, slot.shape).astype(np.float32)
        for slot in checkpoint.slots(model)
        for name in slot.names
    }
    for name in filter(checkpoint.is_flipped, tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def for_tpu():
    """Trace programs for a TPU that is not there."""
    device = AbstractDevice("TPU v5 lite", 1, "tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def emitters(on):
    """Options of a compiler that has two kinds of fusions on a CPU. After 0.10 one kind is left, and no option."""
    return (
        {"xla_cpu_use_fusion_emitters": on}
        if jax.__version__.startswith("0.10.")
        else {}
    )


def assert_same_model(got, wanted, compare=np.testing.assert_array_equal):
    """Compare two models' configurations, and their weights by path."""
    assert got.config == wanted.config
    ours = dict(nnx.to_flat_state(nnx.state(got)))
    theirs = dict(nnx.to_flat_state(nnx.state(wanted)))
    assert ours.keys() == theirs.keys()
    for path, weight in theirs.items():
        compare(ours[path].get_value(), weight.get_value(), err_msg=str(path))


def lora_tensors(config, draw, rank=2):
    """Return the factors of a PEFT adapter of all linear maps."""
    found = {}
    for path, (d_in, d_out) in linear_shapes(config).items():
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            found[f"base_model.model.{path}.lora_{factor}.weight"] = draw(shape).astype(
                np.float32
            )
    return found


def compiled(function, *trees, out_shardings=None, options=None):
    """Return the compiled program of `function(*trees)`, which takes a list of the trees' leaves, and the leaves.

    Types are checked of trees that hold arrays, and a compiled program's description is no array.
    """
    leaves, tree = jax.tree.flatten(trees)
    run = jax.jit(
        lambda leaves: function(*tree.unflatten(leaves)), out_shardings=out_shardings
    )
    return run.lower(leaves).compile(compiler_options=options), leaves


@functools.cache
def _drawn(config, seed):
    return nnx.split(T5(config, rngs=nnx.Rngs(seed)))


def t5(config=CONFIG, seed=0):
    return nnx.merge(*_drawn(config, seed), copy=True)


def pool(
    modules,
    ranks=lambda n, site, layer: 4,
    *,
    names="qv",
    config=CONFIG,
    seed=0,
):
    """Random modules at the sites whose last name is one of `names`, about as large as the base's kernels."""
    rng = np.random.default_rng(seed)
    A = {}
    B = {}
    rank = {}
    for name, site in config.sites.items():
        if name.rpartition(".")[2] not in names:
            continue
        r = np.array(
            [
                [ranks(n, name, layer) for n in range(modules)]
                for layer in range(site.layers)
            ]
        )
        real = np.arange(r.max()) < r[:, :, None]
        a = (
            rng.normal(size=(*r.shape, site.d_in, r.max()))
            * site.d_in**-0.5
            * real[:, :, None, :]
        )
        b = rng.normal(size=(*r.shape, r.max(), site.d_out)) * 0.5 * real[:, :, :, None]
        A[name] = jnp.asarray(a.astype(np.float32))
        B[name] = jnp.asarray(b.astype(np.float32))
        rank[name] = jnp.asarray(r.astype(np.int32))
    return lf.LoraPool(
        A=A, B=B, rank=rank, names=tuple(f"module_{n}" for n in range(modules))
    )


def frozen(model, modules=None, terms=lf.gram):
    """The model with a pool or a basis, and the terms of norms.

    By default it has three modules of rank 4, of which the first has nothing in the decoder.
    """
    modules = modules or pool(
        3, lambda n, site, layer: 0 if n == 0 and "decoder" in site else 4
    )
    kernels = lf.kernels(model, modules.sites)
    used = {site: kernels[site] for site in modules.rank}
    return lf.Frozen(nnx.state(model), modules, jax.jit(terms)(modules, used))


def problem(
    method,
    weights,
    index=(2, 0),
    config=CONFIG,
    **more,
):
    """A problem of the small T5; by default of a seed that fuses two of three modules."""
    graph, _ = _drawn(config, 0)
    return lf.Problem(
        graph=graph,
        method=method,
        frozen=weights,
        index=jnp.asarray(index, jnp.int32),
        **more,
    )


def loss(params, of):
    """The training loss on a batch."""
    return lf.objective(params, batch(), of)[0]


def batch(config=CONFIG, seed=0, *, rows=3, source=7, target=5):
    """Random tokens, of which the last row's are partly padding."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(2, config.vocab_size, (rows, source))
    labels = rng.integers(2, config.vocab_size, (rows, target))
    labels[-1, target // 2 :] = -100
    lengths = np.array([source] * (rows - 1) + [source // 2])
    return lf.Batch(
        input_ids=jnp.asarray(input_ids.astype(np.int32)),
        input_mask=jnp.asarray(np.arange(source) < lengths[:, None]),
        labels=jnp.asarray(labels.astype(np.int32)),
        row_mask=jnp.asarray(np.ones(rows, bool)),
    )


@jax.jit
def matrices(adapters, kernels):
    """Return what each adapted linear map multiplies by, (W + dW) times the scale, by site [L, d_in, d_out]."""

    def of_layer(adapter, kernel):
        return adapter(jnp.eye(kernel.shape[0]), kernel)

    return {
        site: jax.vmap(of_layer)(adapter, kernels[site])
        for site, adapter in adapters.items()
    }


def coefficients(shape, seed=0):
    """Coefficients whose sign alternates, none small."""
    size = np.random.default_rng(seed).uniform(0.3, 1.0, shape)
    sign = 1 - 2 * (np.indices(shape).sum(axis=0) % 2)
    return jnp.asarray((size * sign).astype(np.float32))


def coefficient_of(array, pool, granularity, config=CONFIG):
    """Return which of the coefficients acts on module n at a site in a layer: a number, or one for each rank.

    Columns of blocks are encoder, then decoder; columns of sites go block by block, in the order of computation.
    """
    array = np.asarray(array, np.float64)
    depths = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    blocks = [
        (stack, layer) for stack, depth in depths.items() for layer in range(depth)
    ]
    columns = [
        (site, n)
        for stack, n in blocks
        for site in config.sites
        if site in pool.A and site.startswith(stack)
    ]

    def look_up(n, site, layer):
        if granularity == "global":
            return array[n]
        if granularity == "block":
            return array[n, blocks.index((site.partition(".")[0], layer))]
        return array[n, columns.index((site, layer))]

    return look_up


def updates(pool, index, coefficient, composition):
    """Return dW [d_in, d_out] by site and layer, by the definition, in float64."""
    found = {}
    for site in pool.A:
        A = np.asarray(pool.A[site], np.float64)
        B = np.asarray(pool.B[site], np.float64)
        for layer in range(A.shape[0]):
            left = 0.0
            right = 0.0
            total = 0.0
            for n, i in enumerate(index):
                c = coefficient(n, site, layer)
                c = c[: A.shape[3]] if c.ndim else c
                a = A[layer, i] * c
                b = B[layer, i]
                total = total + a @ b
                left = left + a
                right = right + (b.T * c).T
            found[site, layer] = total if composition == "sum" else left @ right
    return found
