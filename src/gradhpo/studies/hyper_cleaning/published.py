"""Table 2 of the paper: test accuracies, mean and half of the 95 % interval over five trials."""

__all__ = ["ACCURACY"]

ACCURACY: dict[tuple[str, float], dict[str, tuple[float, float]]] = {
    ("mnist", 0.3): {
        "fixed": (0.7046, 0.0547),
        "t1t2": (0.6693, 0.012),
        "implicit_neumann": (0.7197, 0.0454),
        "greedy": (0.8706, 0.0077),
    },
    ("mnist", 0.5): {
        "fixed": (0.5152, 0.0161),
        "t1t2": (0.5186, 0.0277),
        "implicit_neumann": (0.5414, 0.0666),
        "greedy": (0.7773, 0.0170),
    },
    ("fashion_mnist", 0.3): {
        "fixed": (0.5946, 0.0412),
        "t1t2": (0.6207, 0.0441),
        "implicit_neumann": (0.6063, 0.0503),
        "greedy": (0.7257, 0.0109),
    },
    ("fashion_mnist", 0.5): {
        "fixed": (0.5399, 0.0688),
        "t1t2": (0.5140, 0.0553),
        "implicit_neumann": (0.4768, 0.0151),
        "greedy": (0.6621, 0.0150),
    },
}
"""By data set and noise, then by method."""
