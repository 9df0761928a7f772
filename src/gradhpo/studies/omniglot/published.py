"""The authors' figures for the study `omniglot`.

Source:
    "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025),
    table 3: accuracy in per cent, mean and half of the 95 % interval over five trials.
"""

__all__ = ["ACCURACY"]

ACCURACY: dict[str, dict[int, tuple[float, float]]] = {
    "fo": {2: (87.31, 1.79), 3: (78.22, 1.04), 5: (69.71, 0.5), 10: (62.41, 1.95)},
    "one_step": {2: (89.4, 0.36), 3: (78.25, 1.03), 5: (66.7, 3.09), 10: (52.23, 1.63)},
    "implicit_neumann": {2: (87.1, 2.52), 3: (79.36, 2.31), 5: (72.57, 2.14), 10: (53.62, 5.92)},
    "greedy": {2: (93.5, 0.34), 3: (86.83, 0.78), 5: (80.46, 1.08), 10: (66.92, 2.04)},
}
"""Method and ways to mean and half interval."""
