"""Fixtures for all tests: float64, an empty slate for warnings, a counter of compilations."""

import jax
import jax.monitoring
import pytest

from gradhpo.algorithms import _programs

COMPILED = "/jax/core/compile/backend_compile_duration"


def _default_float(wide: bool):
    """`jax.config` is spelled alike in every version (the context manager moved). JAX keeps
    programs of the two settings apart; the facade's count of compilations must not add them."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", wide)
    _programs.programs.cache_clear()
    yield
    jax.config.update("jax_enable_x64", before)
    _programs.programs.cache_clear()


@pytest.fixture
def x64():
    """float64 as JAX's default float type, whatever the job's own setting is."""
    yield from _default_float(True)


@pytest.fixture
def x32():
    """float32 as the default, in the `JAX_ENABLE_X64=1` job as well."""
    yield from _default_float(False)


@pytest.fixture(autouse=True)
def _nobody_else_compiled():
    """The warning about functions compiled again and again counts within one test."""
    _programs._compilations.clear()


@pytest.fixture
def compilations():
    """`compilations() -> int`: XLA compilations since the test began."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == COMPILED:
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seen)
    jax.monitoring.unregister_event_duration_listener(listen)
