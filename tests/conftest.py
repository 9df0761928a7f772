"""The compiler of the tests, and fixtures: dtypes, a counter of compilations.

Three quarters of a run used to be XLA optimising programs that then run once, on a few numbers. So
the tests leave most of that out, and whatever a checkout runs (processes, jobs, notebooks) shares
what is compiled. A variable that is set already wins: with JAX_DISABLE_MOST_OPTIMIZATIONS=0 the
compiler is that of users, as in `make test-optimised` and for tests marked `optimised`.
"""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported, which reads them once.
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# JAX writes the call stack of every operation, deep under pytest, into a program that nobody reads.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() not in ("", "0", "false", "off", "no")
# The emitters of fused loops take half of what is left, and a fifth of the rest goes into cutting
# small programs into 32 parts. XLA ends the process at a flag that it does not know, so only
# versions that have been tried get these.
if QUICK and version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

# A shell lets what it runs in the background ignore Ctrl-C, and all processes below inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A process holds millions of objects that JAX has traced, and would go through them all time and
# again in search of cycles.
gc.set_threshold(200_000, 20, 100)

import jax  # noqa: E402
import jax.monitoring  # noqa: E402
import pytest  # noqa: E402

from gradhpo import clear_caches  # noqa: E402
from gradhpo.driver import _recompilation  # noqa: E402

# Sent wherever JAX asks for an executable, also where the cache on disk then has it: the count
# means "another program" and does not depend on what ran before.
COMPILED = "/jax/core/compile/backend_compile_duration"
compiled = []  # seconds of each; one listener for all tests, because old versions cannot drop one
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compiled.append(duration) if event == COMPILED else None
)


def pytest_collection_modifyitems(config, items):
    """Leave out what another job does: bits and counts of programs are compared by the compiler
    of users, and a test that sets its own default of floats is one of the ordinary job."""
    if QUICK:
        by_users = pytest.mark.skip(reason="`make test` runs it by the compiler that users have")
        for item in items:
            if item.get_closest_marker("optimised"):
                item.add_marker(by_users)
    if jax.config.read("jax_enable_x64"):
        own = [item for item in items if {"x64", "x32"} & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=own)
        items[:] = [item for item in items if item not in own]


def _default_float(wide: bool):
    """`jax.config` is spelled alike in every version (the context manager moved). JAX keeps
    programs of the two settings apart; the facade's count of compilations must not add them."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", wide)
    clear_caches()
    yield
    jax.config.update("jax_enable_x64", before)
    clear_caches()


@pytest.fixture
def x64():
    """float64 as JAX's default float type, whatever the job's own setting is."""
    yield from _default_float(True)


@pytest.fixture
def x32():
    """float32 as the default, in the `JAX_ENABLE_X64=1` job as well."""
    yield from _default_float(False)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as Python handles it; a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _nobody_else_compiled():
    """The warning about functions compiled again and again counts within one test."""
    _recompilation.compilations.clear()


@pytest.fixture
def collect():
    """`gc.collect()` among what the test has made: a process holds millions of older objects, and
    a search through all of them takes seconds."""
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


@pytest.fixture
def compilations():
    """`compilations() -> int`: XLA compilations since the test began."""
    before = len(compiled)
    yield lambda: len(compiled) - before
