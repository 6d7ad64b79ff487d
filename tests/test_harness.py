"""The strictness that other tests rely on is really on."""

import hashlib
import importlib
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import seeded


def test_mixed_dtypes_raise():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_mixed_ranks_raise():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_weights_from_a_seed_have_the_bits_that_goldens_were_made_with():
    """Integer arithmetic and one rounding: the same on every machine."""
    weights = seeded.normal("a name", (64, 65), 0.1, mean=1.0)
    numbers = seeded.integers("a name", (100,), 3, 256)
    digests = [
        hashlib.sha256(array.tobytes()).hexdigest()[:16]
        for array in (weights, numbers.astype("<i8"))
    ]
    assert digests == ["94307ac8e7c3dec2", "5124f9a9725b5a0b"]
    assert abs(weights.mean() - 1) < 0.01 and abs(weights.std() - 0.1) < 0.005


def test_four_devices():
    assert jax.device_count() == 4


def test_programs_are_cached_on_disk():
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((5, 5)))
    assert any(
        "lambda" in entry.name
        for entry in Path(jax.config.jax_compilation_cache_dir).iterdir()
    )


def test_warnings_are_errors():
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_shapes_are_checked_in_the_package(tmp_path, monkeypatch):
    # A module that claims the package's name, written here so that its annotation is known to be broken.
    source = (
        "from jaxtyping import Array, Float\n"
        "def twice(x: Float[Array, 'B T']) -> Float[Array, 'B']:\n"
        "    return x + x\n"
    )
    (tmp_path / "_ill_typed.py").write_text(source)
    import lorafusion_jax

    monkeypatch.setattr(lorafusion_jax, "__path__", [str(tmp_path)])
    try:
        module = importlib.import_module("lorafusion_jax._ill_typed")
        with pytest.raises(jaxtyping.TypeCheckError, match="twice"):
            module.twice(jnp.ones((2, 3)))
    finally:
        sys.modules.pop("lorafusion_jax._ill_typed", None)
