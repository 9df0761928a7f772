"""`compute_hypergradient(..., with_metadata=True)`: what `step` would say of the same estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import KINDS, batch, method, start, step, train_loss, val_loss

from gradhpo import Status, outer

OF_THE_RUN = {"first_bad_step", "n_rejected"}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_what_step_reports(name):
    opt = method(name)
    state = opt.init(*start(), batch(0))
    losses = train_loss, val_loss
    arguments = state, batch(0), batch(100), *losses
    plain = opt.compute_hypergradient(*arguments)
    h, metadata = opt.compute_hypergradient(*arguments, with_metadata=True)
    jax.tree.map(np.testing.assert_array_equal, plain, h)
    wanted = step(opt, state).metadata
    assert metadata.keys() == wanted.keys() - OF_THE_RUN
    for key, value in metadata.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-6, err_msg=key)
        assert value.dtype == wanted[key].dtype
    assert state.metadata["status"] == Status.OK and int(state.step) == 0  # untouched


@pytest.mark.parametrize(
    "train, val, code",
    [
        (1.0, 1.0, Status.OK),
        (np.nan, 1.0, Status.NONFINITE_TRAIN_STATE),
        (1.0, np.inf, Status.NONFINITE_VAL_LOSS),
    ],
)
def test_the_status_of_the_guard(train, val, code):
    opt = method("reverse")
    state = opt.init(*start())
    arguments = batch(0) * np.float32(train), batch(1) * np.float32(val), train_loss, val_loss
    _, metadata = opt.compute_hypergradient(state, *arguments, with_metadata=True)
    assert metadata["status"] == code


def test_under_jit_and_vmap():
    """Over validation batches, of which one is NaN."""
    opt = method("one_step")
    state = opt.init(*start())
    batches = np.stack([batch(1), batch(2) * np.nan, batch(3)])

    @jax.jit
    @jax.vmap
    def both(val):
        return opt.compute_hypergradient(
            state, batch(0), val, train_loss, val_loss, with_metadata=True
        )

    h, metadata = both(batches)
    codes = [Status.OK, Status.NONFINITE_VAL_LOSS, Status.OK]
    np.testing.assert_array_equal(metadata["status"], codes)
    alone, _ = opt.compute_hypergradient(
        state, batch(0), batches[2], train_loss, val_loss, with_metadata=True
    )
    np.testing.assert_allclose(h["rate"][2], alone["rate"], rtol=1e-6)


def test_metrics_of_the_losses_and_of_the_outer_update():
    def judged(w, lam, batch):
        return val_loss(w, lam, batch), {"largest": jnp.max(jnp.abs(w["w"]))}

    def positive(lam):
        return jax.tree.map(lambda x: jnp.maximum(x, -1.0), lam)

    opt = method("one_step", outer_optimizer=outer.followed_by(optax.sgd(0.1), positive))
    state = opt.init(*start())
    arguments = batch(0), batch(100), train_loss, judged
    _, metadata = opt.compute_hypergradient(state, *arguments, with_metadata=True)
    wanted = step(opt, state, losses=(train_loss, judged)).metadata
    for key in ("val_largest", "outer_stationarity", "train_loss"):
        np.testing.assert_allclose(metadata[key], wanted[key], rtol=1e-6)
