"""The authors' figures for the study `many_shot`.

Source:
    Lee et al. (2022), table 2: accuracy in per cent on 500 test tasks, mean and half of the 95 %
    interval over five runs, and products per inner-optimization.
"""

__all__ = ["ACCURACY", "products", "reported"]


def products(model: str, method: str) -> int:
    """Per inner-optimization of 100 steps, as the authors count: N + 1 for each Neumann update, two
    per step of DrMAD.

    >>> products("warpgrad", "implicit_neumann")
    55
    """
    neumann = 55 if model == "warpgrad" else 75  # (10, 5) and (2, 25)
    counts = {"fo": 0, "one_step": 50, "drmad": 199, "hyperdistill": 58}
    return {**counts, "implicit_neumann": neumann}[method]


def reported(model: str, dataset: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """The column of `ACCURACY` for this data set, or where there is none another one of the model;
    and the data set that it is of.

    >>> reported("anil", "cifar100")[0], reported("warpgrad", "/data/tiny-imagenet-200")[0]
    ('tiny_imagenet', 'tiny_imagenet')
    """
    name = "tiny_imagenet" if "tiny" in dataset.lower() else dataset
    columns = {on: column for (of, on), column in ACCURACY.items() if of == model}
    on = name if name in columns else next(iter(columns))
    return on, columns[on]


ACCURACY: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("anil", "tiny_imagenet"): {
        "fo": (53.62, 0.06),
        "one_step": (53.90, 0.43),
        "drmad": (49.84, 1.35),
        "implicit_neumann": (53.76, 0.31),
        "hyperdistill": (56.37, 0.27),
    },
    ("warpgrad", "cifar100"): {
        "fo": (58.16, 0.52),
        "one_step": (58.18, 0.52),
        "drmad": (55.13, 0.64),
        "implicit_neumann": (58.88, 0.65),
        "hyperdistill": (60.91, 0.27),
    },
    ("warpgrad", "tiny_imagenet"): {
        "fo": (53.54, 0.74),
        "one_step": (49.97, 2.46),
        "drmad": (50.71, 1.16),
        "implicit_neumann": (50.15, 0.98),
        "hyperdistill": (55.04, 0.52),
    },
    ("meta_weight_net", "cifar100"): {
        "one_step": (58.45, 0.40),
        "drmad": (57.03, 0.42),
        "implicit_neumann": (59.34, 0.27),
        "hyperdistill": (60.82, 0.33),
    },
}
