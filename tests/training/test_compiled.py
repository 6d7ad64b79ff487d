"""Compiled programs are forgotten before Linux's limit of mappings ends the process."""

import jax
import jax.numpy as jnp
import pytest

from lorafusion_jax.training import compiled


@pytest.fixture
def limit(tmp_path, monkeypatch):
    file = tmp_path / "max_map_count"
    monkeypatch.setattr(compiled, "_LIMIT", file)
    return file


@pytest.mark.skipif(not compiled._MAPPINGS.is_file(), reason="needs Linux's /proc")
def test_programs_are_forgotten_where_mappings_run_out(limit):
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(2))
    limit.write_text("1000000000\n")
    assert not compiled.make_room()
    assert double._cache_size() == 1
    limit.write_text("2\n")
    assert compiled.make_room()
    assert double._cache_size() == 0
    assert double(jnp.ones(2)).tolist() == [2, 2]


def test_elsewhere_nothing_is_done(limit):
    assert not compiled.make_room()
