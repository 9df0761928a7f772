"""The compiler of the tests, and fixtures: dtypes, a counter of compilations.

Three quarters of a run used to be XLA optimising programs that then run once, on a few numbers. So
the tests leave most of that out, and whatever a checkout runs (processes, jobs, notebooks) shares
what is compiled. A variable that is set already wins; `make test-optimised` sets one.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILER = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
for name, value in COMPILER.items():  # before JAX is imported, which reads them once
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import jax.monitoring  # noqa: E402
import pytest  # noqa: E402

from gradhpo.algorithms import _programs, _recompilation  # noqa: E402

SETTING = "jax_disable_most_optimizations"
QUICK = jax.config.read(SETTING)

# Sent wherever JAX asks for an executable, also where the cache on disk then has it: the count
# means "another program" and does not depend on what ran before.
COMPILED = "/jax/core/compile/backend_compile_duration"


def pytest_collection_modifyitems(config, items):
    """With 64-bit floats as the default, a test that sets its own default would repeat what it
    does in the ordinary job."""
    if not jax.config.read("jax_enable_x64"):
        return
    forced = [item for item in items if {"x64", "x32"} & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=forced)
    items[:] = [item for item in items if item not in forced]


def _use_compiler(quick: bool):
    """The setting is no part of the keys of JAX's caches in memory, so they are emptied."""
    if jax.config.read(SETTING) != quick:
        jax.config.update(SETTING, quick)
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test and of its module
def pytest_runtest_setup(item):
    """A test marked `optimised` has the compiler of users, the next one the quick one again."""
    _use_compiler(QUICK and item.get_closest_marker("optimised") is None)


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
    _recompilation.compilations.clear()


@pytest.fixture
def use_compiler():
    """`use_compiler(quick=...)`; the set-up of the next test puts it right."""
    return _use_compiler


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
