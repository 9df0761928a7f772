"""Every public name exists, and the calls that are promised keep their names and arguments."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

SOURCE = Path(__file__).parents[1] / "src"
DOCS = Path(__file__).parents[1] / "docs"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.stem == "__init__"
    or not (
        path.stem.startswith("_") or path.parent.stem in ("starters", "problems")
    )  # as users write
)
PROMISED = {
    "gradhpo.core.types": "PyTree LossFn DataBatch LossFunctions MetricDict",
    "gradhpo.core.state": "BilevelState",
    "gradhpo.core.base": "BilevelOptimizer",
    "gradhpo.algorithms.online": "OnlineHypergradientOptimizer",
    "gradhpo.algorithms.t1t2": "T1T2Optimizer",
    "gradhpo.algorithms.t1_t2": "T1T2Optimizer",
    "gradhpo.algorithms.greedy": "GreedyOptimizer",
    "gradhpo.algorithms.baselines": "OneStepOptimizer FOOptimizer",
    "gradhpo.utils.gradients": "tree_l2_norm tree_normalize tree_dot tree_zeros_like tree_lerp "
    "vjp_wrt_lambda vjp_wrt_both update_w_star",
    "gradhpo.utils.validation": "",
    "gradhpo.utils.logging": "",
}
# Constructor arguments of the tutorial, and its arguments of `run` besides the common ones.
CALLS = {
    "OnlineHypergradientOptimizer": (
        ["update_fn", "gamma", "estimation_period", "T"],
        ["lr_reptile", "lr_hyper", "callback"],
    ),
    "T1T2Optimizer": (["update_fn", "gamma", "T"], ["lr_hyper"]),
    "GreedyOptimizer": (["inner_optimizer", "outer_optimizer", "unroll_steps", "gamma"], []),
    "OneStepOptimizer": (["update_fn"], ["T", "lr_reptile", "lr_hyper"]),
    "FOOptimizer": (["update_fn"], ["T", "lr_hyper"]),
}
RUN = ["M", "get_train_batch", "get_val_batch", "train_loss_fn", "val_loss_fn"]


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist_once(name):
    module, package = importlib.import_module(name), importlib.import_module("gradhpo")
    names = getattr(module, "__all__", None)
    if names is None:
        # Only a package that gathers nothing needs no list: it has submodules and no names.
        assert hasattr(module, "__path__"), f"{name} lists no __all__"
        public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
        loose = [n for n, value in public.items() if not inspect.ismodule(value)]
        assert not loose, f"{name} has {loose} and lists no __all__"
        return
    assert len(set(names)) == len(names)
    assert [n for n in names if not hasattr(module, n)] == []
    # A name of the package is the same thing in whichever module it is listed; every example has
    # a function `tune` of its own.
    both = set(names) & set(package.__all__) - ({"tune"} if ".examples." in name else set())
    assert [n for n in both if getattr(module, n) is not getattr(package, n)] == []


@pytest.mark.parametrize("path, names", PROMISED.items(), ids=PROMISED)
def test_promised_names(path, names):
    module, package = importlib.import_module(path), importlib.import_module("gradhpo")
    for name in names.split():
        assert getattr(module, name) is getattr(package, name), f"{name} of {path}, from gradhpo"


@pytest.mark.parametrize("name", CALLS)
def test_promised_arguments(name):
    optimizer = getattr(importlib.import_module("gradhpo"), name)
    constructor, run = CALLS[name]
    inspect.signature(optimizer).bind(**dict.fromkeys(constructor))
    inspect.signature(optimizer.run).bind("self", "state", **dict.fromkeys(RUN + run))
    inspect.signature(optimizer.init).bind("self", "params", "hyperparams")


def test_the_reference_has_every_name_once_in_its_group():
    """`__all__` is grouped by comments; docs/api.md has a table for each group."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    grouped = [name for names in conf.groups().values() for name in names]
    assert grouped == importlib.import_module("gradhpo").__all__
    shown = re.findall(r"<!-- names: (.+) -->", (DOCS / "api.md").read_text("utf-8"))
    assert sorted(shown) == sorted(conf.groups())
    for name in grouped:
        module, _, attribute = conf.home(name).rpartition(".")
        assert attribute in importlib.import_module(module).__all__


def test_bilevel_state():
    state = importlib.import_module("gradhpo").BilevelState
    fields = "params hyperparams inner_opt_state outer_opt_state step metadata memory".split()
    assert list(inspect.signature(state).parameters)[: len(fields)] == fields
    inspect.signature(state.create).bind("params", "hyperparams", "inner_state", "outer_state")


def test_functional_form():
    """`bilevel_step(estimator, outer_optimizer)(problem, state, window) -> state`, by hand: a step
    of gradient descent on (w - lam)^2 / 2 from 2 at the rate 0.1, judged by w^2 / 2."""
    from gradhpo import BilevelProblem, Window, bilevel_step, from_optax, init_state, one_step

    def train_loss(w, lam, batch):
        return jnp.sum((w - lam) ** 2) / 2

    dynamics = from_optax(train_loss, optax.sgd(0.1))
    problem = BilevelProblem(dynamics, lambda w, lam, batch: jnp.sum(w**2) / 2)
    outer, window = optax.sgd(0.5), Window(jnp.zeros(1), jnp.zeros(1))
    state = init_state(problem, one_step(), outer, jnp.float32(2), jnp.float32(1))
    after = bilevel_step(one_step(), outer)(problem, state, window)
    w = 2 - 0.1 * (2 - 1)
    assert float(after.params) == pytest.approx(w)
    assert float(after.hyperparams) == pytest.approx(1 - 0.5 * w * 0.1)  # dw/dlam = 0.1
    assert type(after) is type(state) and int(after.step) == 1
