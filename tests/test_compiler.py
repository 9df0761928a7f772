"""The compiler that `conftest` chooses, and what is counted of it."""

import os

import jax
import jax.numpy as jnp
import pytest


def test_jax_reads_what_conftest_sets():
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true", "on", "yes")
    assert jax.config.read("jax_disable_most_optimizations") == quick
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.optimised
def test_a_marked_test_has_the_compiler_of_users():
    assert jax.config.read("jax_disable_most_optimizations") is False
    assert "emitters" not in os.environ.get("XLA_FLAGS", "")


def test_the_cache_on_disk_does_not_change_the_count(compilations):
    """Two functions are two programs, also where the second is found on disk."""
    hits, x = [], jnp.ones(7)

    def listen(event, **kwargs):
        hits.append(event == "/jax/compilation_cache/cache_hits")

    jax.monitoring.register_event_listener(listen)  # for good: old versions cannot drop one
    before = compilations()
    for _ in range(2):
        jax.jit(lambda x: x * 5 - 2)(x)
    assert compilations() == before + 2
    assert any(hits) or not jax.config.jax_enable_compilation_cache
