"""One entry makes a method known: to the command line, the checks, the tests and the documents."""

import importlib
import re
from pathlib import Path

import facade_cases
import numpy as np
import pytest

from gradhpo import check_hypergradient, cli
from gradhpo.algorithms import METHODS, EstimatorOptimizer, Example, Method, register
from gradhpo.algorithms.tables import cost_table, summary_table
from gradhpo.core.estimator import Cost
from gradhpo.diagnostics import known_methods
from gradhpo.estimators.one_step import one_step
from gradhpo.testing import check_method
from gradhpo.testing.problems import ridge

ROOT = Path(__file__).parents[2]
TABLES = {"README.md": summary_table, "docs/methods/index.md": cost_table}


@pytest.fixture
def restored():
    """Methods that a test registers are forgotten after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def blocks_of(page):
    """The code of a page up to and with the entry of the method."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    entry = next(i for i, block in enumerate(blocks) if "register(" in block)
    return blocks[: entry + 1]


@pytest.mark.usefixtures("x64")
def test_one_file_with_one_entry_is_all_it_takes(restored, capsys):
    """The example of docs/extending.md, up to its entry, and nothing else: every place knows it."""
    name, before = "endpoint", set(METHODS)
    exec("\n".join(blocks_of(ROOT / "docs" / "extending.md")), {"__name__": "mine"})
    assert set(METHODS) - before == {name}
    method = METHODS[name]

    assert cli.main(["list"]) == 0
    assert re.search(f"^  {name} +{method.description}$", capsys.readouterr().out, re.M)
    assert name in known_methods()
    row = check_hypergradient(ridge(3), 3, [name]).rows[name]
    assert (row.gradients, row.products) == (7, 3) == method.estimator(3).cost(3, size=1)
    check_method(method)  # as tests/testing/test_conformance.py does
    assert f"| `{name}` | `EndpointOptimizer` |" in cost_table()
    assert f"| [end point](docs/methods/{name}.md) |" in summary_table()

    cases = importlib.reload(facade_cases)  # as pytest loads it, when the methods are known
    try:
        assert name in cases.METHODS and name in cases.ANY_STEP
        tuner = cases.method(name)
        assert tuner.unroll_steps == 2
        state = cases.run(tuner, tuner.init(*cases.start()))
        assert int(state.step) == 2 * cases.T // 2 and np.isfinite(state.hyperparams["rate"])
    finally:
        METHODS.pop(name)
        importlib.reload(facade_cases)


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_the_documents_are_generated(page):
    table = TABLES[page]
    head = f"<!-- {table.__name__}() of gradhpo.algorithms.tables -->\n"
    _, _, rest = (ROOT / page).read_text("utf-8").partition(head)
    shown, end, _ = rest.partition(f"<!-- end of {table.__name__}() -->\n")
    assert end and shown.strip() == table(), (
        f"put between the two comments of {page} what this prints: "
        f"python -c 'from gradhpo.algorithms.tables import *; print({table.__name__}())'"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page_and_makes_its_estimator_by_its_factory(name):
    method = METHODS[name]
    assert method.summary is not None
    assert (ROOT / "docs" / "methods" / f"{method.summary.page}.md").exists()
    assert method.factory.__module__.startswith("gradhpo.estimators.")
    module = importlib.import_module(method.optimizer.__module__)
    assert getattr(module, method.factory.__name__) is method.factory


class Mine(EstimatorOptimizer):
    def estimator(self, loop="scan"):
        return one_step()


class Free(EstimatorOptimizer):
    def estimator(self, loop="scan"):
        return one_step()._replace(price=None)


GOOD = Method("mine", Mine, one_step, "a method", Example(("ridge",), exact_on=("ridge",)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"name": "reverse"}, ValueError, "'reverse' is registered already, by ReverseOptimizer"),
        ({"name": ""}, ValueError, "lacks name"),
        ({"description": ""}, ValueError, "'mine' lacks description"),
        ({"optimizer": one_step}, TypeError, "'mine' needs a class of .*EstimatorOptimizer"),
        ({"example": Example(())}, ValueError, r"lacks example\.problems.*; example\.exact_on"),
        ({"needs": ("rank",)}, ValueError, r"'rank' in example\.settings, .*example\.of_class"),
        ({"optimizer": Free}, ValueError, "the price of its estimator"),
    ],
)
def test_an_entry_that_lacks_something_is_refused(restored, change, error, message):
    with pytest.raises(error, match=message):
        register(GOOD._replace(**change))
    assert "mine" not in METHODS or change.get("name") == "reverse"


@pytest.mark.usefixtures("x64")
def test_a_method_of_another_package(restored):
    """A problem may be a function, and a row in the tables is not a must."""
    mine = register(GOOD._replace(example=Example((ridge,), exact_on=(ridge,))))
    assert METHODS["mine"] is mine and mine.summary is None
    assert known_methods()[-1] == "mine" and "mine" not in summary_table()
    check_method(mine)
    with pytest.raises(ValueError, match="no problem 'rigde'"):
        check_method(GOOD._replace(example=Example(("rigde",))))


@pytest.mark.parametrize("name", METHODS)
def test_costs_add_up(name):
    """So many episodes cost so many times one, and the fits come on top."""
    estimator = METHODS[name].tried()
    T = 2 * estimator.unroll_steps
    one = estimator._replace(start_price=None).cost(T, 3)
    assert estimator.cost(T, 3, episodes=4, period=2) == Cost(
        4 * one.gradients + 2 * (estimator.cost(T, 3).gradients - one.gradients),
        4 * one.products + 2 * (estimator.cost(T, 3).products - one.products),
    )
    assert estimator.cost(2 * T, 3)[0] >= 2 * one.gradients >= 2 * T
