"""The figures of the paper for the study `toy`, to be held against ours.

Source:
    Figure 2 of the paper, read from its vector graphics; the settings are those that reproduce
    it, see `gradhpo.studies.toy`. A reading is good to about 0.003.
"""

__all__ = ["LAST_COSINE", "LOSSES", "STEPS"]

STEPS = (0, 1, 10, 100, 500, 999)
"""Outer steps, counted from 0; the loss is the one after the inner steps of each."""

LOSSES: dict[str, tuple[float, ...]] = {
    "full, T=5": (23.709, 20.558, 16.084, 14.812, 9.143, 4.096),
    "IFT(2), T=5": (23.709, 20.559, 16.117, 15.222, 11.193, 6.797),
    "T1-T2, T=5": (23.709, 20.561, 16.164, 15.795, 14.242, 12.241),
    "greedy 0.9, T=5": (23.709, 20.559, 16.074, 14.626, 8.367, 3.591),
    "greedy 0.5, T=5": (23.709, 20.560, 16.136, 15.446, 12.370, 8.726),
    "greedy 0.3, T=5": (23.709, 20.560, 16.151, 15.637, 13.395, 10.578),
    "full, T=10": (20.562, 17.568, 15.981, 14.193, 6.481, 1.670),
    "IFT(5), T=10": (20.562, 17.571, 16.021, 14.634, 8.376, 3.283),
    "T1-T2, T=10": (20.562, 17.578, 16.126, 15.790, 14.238, 12.236),
    "greedy 0.9, T=10": (20.562, 17.569, 15.939, 13.652, 5.087, 1.297),
    "greedy 0.5, T=10": (20.562, 17.576, 16.092, 15.414, 12.239, 8.514),
    "greedy 0.3, T=10": (20.562, 17.577, 16.111, 15.629, 13.381, 10.558),
}
"""Validation loss at `STEPS`."""

LAST_COSINE: dict[str, float] = {
    "full, T=5": 1.0,
    "IFT(2), T=5": 0.9915,
    "T1-T2, T=5": 0.9635,
    "greedy 0.9, T=5": 0.9992,
    "greedy 0.5, T=5": 0.9761,
    "greedy 0.3, T=5": 0.9680,
    "full, T=10": 1.0,
    "IFT(5), T=10": 0.9969,
    "T1-T2, T=10": 0.9231,
    "greedy 0.9, T=10": 0.9743,
    "greedy 0.5, T=10": 0.9434,
    "greedy 0.3, T=10": 0.9297,
}
"""Cosine at outer step 999 to the exact hypergradient of the full run there."""
