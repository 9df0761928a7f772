"""The look of methods: every one has its own, in every figure, for colour-blind readers too."""

from itertools import combinations

import numpy as np
import pytest

from gradhpo.algorithms.registry import METHODS
from gradhpo.studies.hypergradient_descent.optimizers import OPTIMIZERS
from gradhpo.tuning.searches import SEARCHES
from gradhpo.utils._styles import COLORS, STYLES, styles

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": np.array(
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    ),
    "deuteranopes": np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, seen):
    """CIE L*a*b* of "#RRGGBB", as seen."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(seen @ linear, 1e-4, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_no_two_methods_look_alike():
    assert len(set(STYLES.values())) == len(STYLES)


def test_every_method_has_a_look_of_its_own():
    known = [*METHODS, *SEARCHES, "fixed"]
    assert set(known) <= set(STYLES)
    assert len({STYLES[name] for name in known}) == len(known)
    assert {"sgd", "sgd_hd", "sgdn", "sgdn_hd", "adam", "adam_hd"} <= set(STYLES) & set(OPTIMIZERS)


@pytest.mark.parametrize("seen", SEEN_BY.values(), ids=SEEN_BY)
def test_methods_with_one_marker_have_colours_far_apart(seen):
    for a, b in combinations([STYLES[name] for name in METHODS], 2):
        distance = np.linalg.norm(lab(a.color, seen) - lab(b.color, seen))
        assert a.marker != b.marker or distance > 20  # 2 is just noticeable
    for style in STYLES.values():
        assert lab(style.color, seen)[0] < 75  # stands out from white


@pytest.mark.parametrize(
    "name, method",
    [
        ("hyperdistill:gamma=0.9,outer_rate=0.05", "hyperdistill"),
        ("ridge in training: drmad", "drmad"),
        ("greedy 0.9, T=5", "greedy"),
        ("one_step_virtual", "one_step"),
        ("N.IFT(10, 1)", "implicit_neumann"),
        ("IFT(2)", "implicit_neumann"),
        ("T1-T2", "t1t2"),
        ("untuned", "fixed"),
    ],
)
def test_a_name_with_settings_looks_like_its_method(name, method):
    assert styles(["reverse", name, "hidden.l2"])[name] == STYLES[method]


def test_variants_of_one_method_differ_and_the_first_is_the_method():
    found = styles([f"discounted_sum {gamma}" for gamma in (0, 0.5, 0.9, 0.99, 0.999)])
    assert found["discounted_sum 0"] == STYLES["discounted_sum"]
    assert len({(look.color, look.dash) for look in found.values()}) == 5
    assert len({look.color for look in found.values()}) == 5


def test_other_names_take_what_the_figure_does_not_use():
    names = [f"weight {i}" for i in range(28)]
    assert len({(look.color, look.dash) for look in styles(names).values()}) == 28
    few = styles(["one_step", *names[:6], "reverse"])
    assert list(few) == ["one_step", *names[:6], "reverse"]
    assert len({few[name].color for name in names[:5]} | {COLORS[0], COLORS[1]}) == 7
