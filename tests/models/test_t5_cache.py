"""T5 token by token, with a cache in the layout of a CPU and in that of accelerators, against teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lorafusion_jax.models.t5 import attention
from lorafusion_jax.models.t5.model import decoder_inputs

_TOKENS = jnp.array([[5, 9, 4, 7], [3, 3, 8, 6]])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_each_token_attends_to_those_before_it(on_cpu, monkeypatch):
    model = tiny.t5()
    config = model.config
    ids = jnp.array([[3, 5, 7, 2, 9], [4, 8, 6, 0, 0]])
    inputs = decoder_inputs(_TOKENS, start_id=model.start_id, pad_id=config.pad_id)
    wanted = model(ids, ids > 0, inputs)

    monkeypatch.setattr(attention, "for_cpu", lambda: on_cpu)
    _, cache = model.prompt(ids, ids > 0, 6, {})
    if not on_cpu:  # heads side by side, so that nothing is padded but the model's own width
        inner = config.num_heads * config.d_kv
        assert {a.shape[-1] for a in cache} == {inner} and {a.ndim for a in cache} == {4}
    step = jax.jit(lambda token, position, cache: model.decode_token(token, position, cache, ids > 0, {}))
    for position, token in enumerate(inputs.T):
        logits, cache = step(token, jnp.int32(position), cache)
        np.testing.assert_allclose(logits, wanted[:, position], rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_mesh_that_divides_heads_keeps_them_apart(monkeypatch):
    monkeypatch.setattr(attention, "for_cpu", lambda: False)
    for sizes, apart in (((2, 2), True), ((4, 1), False)):
        with jax.set_mesh(jax.make_mesh(sizes, ("seed", "model"))):
            assert attention.heads_apart() == apart
