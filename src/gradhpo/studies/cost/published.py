"""The authors' figures for the study `cost`.

Source:
    Lee et al. (2022), table 3: megabytes and seconds per inner-optimization of T = 100 steps, one
    process on an RTX 2080 Ti. ANIL is measured there on TinyImageNet alone, MetaWeightNet on
    CIFAR-100; FO has no hypergradient for MetaWeightNet.
"""

__all__ = ["PRICES"]

PRICES: dict[str, dict[str, tuple[int, float]]] = {
    "anil": {
        "fo": (1430, 6.23),
        "one_step": (1584, 6.80),
        "drmad": (1442, 20.88),
        "implicit_neumann": (1392, 7.98),
        "hyperdistill": (1638, 6.92),
    },
    "warpgrad": {
        "fo": (1092, 5.24),
        "one_step": (1650, 6.88),
        "drmad": (1734, 19.83),
        "implicit_neumann": (1578, 7.43),
        "hyperdistill": (1714, 8.68),
    },
    "meta_weight_net": {
        "one_step": (1214, 6.17),
        "drmad": (1262, 17.57),
        "implicit_neumann": (1262, 6.93),
        "hyperdistill": (1206, 6.04),
    },
}
"""Of WarpGrad the columns for CIFAR-100 are meant; on TinyImageNet all numbers are larger."""
