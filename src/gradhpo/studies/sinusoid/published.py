"""The figures of the paper for the study `sinusoid`, to be held against ours.

Source:
    Lee et al. (2022), table 4 (mean and 95 % interval over 5 meta-training runs), and figure 8,
    read from it: mean test error of HyperDistill against the number of inner-optimizations.
"""

__all__ = ["CURVE", "TEST_MSE"]

TEST_MSE: dict[str, tuple[float, float]] = {
    "fo": (0.567, 0.193),
    "one_step": (0.670, 0.283),
    "drmad": (1.086, 0.176),
    "implicit_neumann": (0.502, 0.146),
    "hyperdistill": (0.327, 0.052),
}

CURVE: dict[int, float] = {12: 0.55, 20: 0.43, 30: 0.35}
