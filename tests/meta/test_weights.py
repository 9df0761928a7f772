"""MetaWeightNet against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from gradhpo.meta.weights import MetaWeightNet  # noqa: E402

LOSSES = jnp.array([0.0, 0.1, 2.3, 9.0])


@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_weights_are_those_of_the_formula(lowest):
    net = MetaWeightNet(hidden=7, lowest=lowest)
    lam = jax.tree.map(lambda x: x.astype(jnp.float32), net.init(jax.random.key(3)))
    units = np.maximum(LOSSES[:, None] * lam["hidden"]["kernel"] + lam["hidden"]["bias"], 0)
    scores = (units @ lam["out"]["kernel"] + lam["out"]["bias"])[:, 0]
    want = lowest + (1 - lowest) / (1 + np.exp(-scores))
    np.testing.assert_allclose(net(lam, LOSSES), want, rtol=1e-5)
    np.testing.assert_allclose(net.loss(lam, LOSSES), np.mean(want * LOSSES), rtol=1e-5)
    # What training sees of the losses is the weight alone.
    np.testing.assert_allclose(jax.grad(net.loss, 1)(lam, LOSSES), want / 4, rtol=1e-5)


def test_initial_weights_are_pytorchs():
    lam = MetaWeightNet().init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, lam) == {
        "hidden": {"kernel": (1, 200), "bias": (200,)},
        "out": {"kernel": (200, 1), "bias": (1,)},
    }
    for layer, bound in (("hidden", 1.0), ("out", 200**-0.5)):
        for leaf in lam[layer].values():
            assert np.abs(leaf).max() <= bound
        assert np.std(lam[layer]["kernel"]) == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"lowest": 1.0}, {"lowest": -0.1}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MetaWeightNet(**settings)
