"""Every public name exists, and the calls that are promised keep their names and arguments."""

import importlib
import inspect
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if not path.stem.startswith("_") or path.stem == "__init__"
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
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")  # one that gathers no names needs no list of them
    names = getattr(module, "__all__", [] if is_package else None)
    assert names is not None, f"{name} lists no __all__"
    assert len(set(names)) == len(names)
    assert [n for n in names if not hasattr(module, n)] == []


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


def test_bilevel_state():
    state = importlib.import_module("gradhpo").BilevelState
    fields = "params hyperparams inner_opt_state outer_opt_state step metadata memory".split()
    assert list(inspect.signature(state).parameters)[: len(fields)] == fields
    inspect.signature(state.create).bind("params", "hyperparams", "inner_state", "outer_state")


def test_functional_form():
    from gradhpo import bilevel_step, one_step

    assert callable(bilevel_step) and callable(one_step)
