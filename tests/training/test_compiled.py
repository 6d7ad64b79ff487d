"""Compiled programs are forgotten before Linux's limit of mappings ends the process."""

import sys

import jax
import jax.numpy as jnp
import pytest

from lorafusion_jax.training import make_room


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_programs_are_forgotten_when_mappings_run_out():
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(2))
    assert not make_room(10**9) and double._cache_size() == 1
    assert make_room(2) and double._cache_size() == 0
    assert double(jnp.ones(2)).tolist() == [2, 2]
