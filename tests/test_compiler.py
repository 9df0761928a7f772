"""The compiler that `conftest` chooses, and what is counted of it."""

import os

import jax
import jax.numpy as jnp
import pytest

SETTING = "jax_disable_most_optimizations"


def test_jax_reads_what_conftest_sets():
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() not in ("", "0", "false")
    assert jax.config.read(SETTING) == quick
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.optimised
def test_a_marked_test_has_the_compiler_of_users():
    assert jax.config.read(SETTING) is False


def test_another_compiler_compiles_again(use_compiler, compilations):
    """Else a marked test would be given what another one has compiled."""
    f, x = jax.jit(lambda x: x * 3 + 1), jnp.ones(3)
    for quick in (True, False, True):
        use_compiler(quick=quick)
        before = compilations()
        f(x), f(x)
        assert compilations() == before + 1


def test_the_cache_on_disk_does_not_change_the_count(compilations):
    """Two functions are two programs, also where the second is found on disk."""
    hits, x = [], jnp.ones(7)

    def listen(event, **kwargs):
        hits.append(event == "/jax/compilation_cache/cache_hits")

    jax.monitoring.register_event_listener(listen)
    before = compilations()
    for _ in range(2):
        jax.jit(lambda x: x * 5 - 2)(x)
    jax.monitoring.unregister_event_listener(listen)
    assert compilations() == before + 2
    assert any(hits) or not jax.config.jax_enable_compilation_cache
