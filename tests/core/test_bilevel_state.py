"""BilevelState: immutable, a pytree, strict about structure."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import BilevelState, Status, status_message
from gradhpo.core.status import status_table
from gradhpo.core.step import strengthen


def make():
    return BilevelState.create({"w": jnp.ones(3)}, {"lr": jnp.array(0.1)}, (), ())


def test_create_starts_at_step_zero_with_unknown_metrics():
    state = make()
    assert state.step == 0 and state.step.dtype == np.int32
    for name in ("train_loss", "val_loss", "hypergrad_norm", "direct_norm", "indirect_norm"):
        assert np.isnan(state.metadata[name]), name
    assert state.get_metric("status") == Status.OK
    assert state.get_metric("first_bad_step") == -1 and state.get_metric("n_rejected") == 0
    assert state.memory == () and state.phi == ()


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().step = 3


def test_update_merges_metadata_and_leaves_the_old_state_alone():
    state = make()
    new = state.update(step=5, metadata={"note": jnp.array(2.0)})
    assert new.step == 5 and new.step.dtype == jnp.int32 and not new.step.aval.weak_type
    assert new.get_metric("note") == 2.0 and np.isnan(new.get_metric("val_loss"))
    assert state.step == 0 and "note" not in state.metadata


def test_update_refuses_what_cannot_be():
    state = make()
    with pytest.raises(TypeError, match="no field 'lamda'.*hyperparams"):
        state.update(lamda=1.0)
    with pytest.raises(ValueError, match=r"params must keep.*\['w'\] against \['b'\]"):
        state.update(params={"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"hyperparams must keep.*\['momentum'\] is only in one"):
        state.update(hyperparams={"lr": 0.1, "momentum": 0.9})


def test_metrics_fall_back_to_the_memory():
    state = make()
    assert state.get_metric("theta", 7.0) == 7.0
    assert state.update(memory={"theta": 0.5}).get_metric("theta") == 0.5
    tuple_memory = jax.tree_util.Partial  # anything with attributes
    assert state.update(memory=tuple_memory(len)).get_metric("func") is len


def test_it_is_a_pytree_through_jit_vmap_scan():
    state = strengthen(make())
    doubled = jax.jit(lambda s: s.update(params=jax.tree.map(lambda x: 2 * x, s.params)))(state)
    np.testing.assert_array_equal(doubled.params["w"], 2 * np.ones(3))
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    mapped = jax.vmap(lambda s: s.update(step=s.step + 1))(batch)
    np.testing.assert_array_equal(mapped.step, [1, 1])
    last, _ = jax.lax.scan(lambda s, _: (s.update(step=s.step + 1), None), state, None, length=4)
    assert last.step == 4


@pytest.mark.parametrize("status", Status)
def test_every_status_has_a_message_with_its_name(status):
    assert status_message(int(status)).startswith(f"{status.name}: ")
    assert status_message(jnp.array(int(status))) == status_message(status)


def test_the_table_of_the_page_on_reliability_is_generated():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text("utf-8")
    _, _, rest = page.partition("<!-- status_table() of gradhpo.core.status -->\n")
    table, end, _ = rest.partition("<!-- end of status_table() -->\n")
    assert end and table.strip() == status_table(), (
        "put between the two comments what this prints: "
        "python -c 'from gradhpo.core.status import *; print(status_table())'"
    )


def test_the_table_has_every_status():
    """With its number, and the words of its message."""
    _, _, *rows = status_table().splitlines()
    assert len(rows) == len(Status)
    for code, row in zip(Status, rows, strict=True):
        name, number, happened, rejected, remedy = row.strip("| ").split(" | ")
        assert (name, int(number)) == (f"`{code.name}`", code)
        assert happened in status_message(code)
        assert rejected.removeprefix("nothing").removeprefix("; ") in status_message(code)
        assert rejected.startswith("nothing") != code.rejects
        assert remedy == "none" or status_message(code).endswith(f". {remedy}")


def test_the_remedy_for_adam_is_named():
    assert "eps_root" in status_message(Status.NONFINITE_HYPERGRAD)
