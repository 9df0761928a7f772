"""The figures of the paper for the study `cosine`, to be held against ours.

Source:
    Lee et al. (2022), figure 3, read from it at the end of meta-training (WarpGrad, CIFAR-100,
    T = 100).
"""

__all__ = ["INDIRECT", "WHOLE"]

WHOLE: dict[str, float] = {
    "fo": 0.962,
    "one_step": 0.966,
    "N.IFT(2, 1)": 0.971,
    "N.IFT(10, 1)": 0.972,
    "drmad": 0.985,
    "hyperdistill": 0.971,
}

INDIRECT: dict[str, float] = {
    "one_step": 0.52,
    "N.IFT(10, 1)": 0.55,
    "drmad": 0.81,
    "hyperdistill": 0.54,
    "discounted_sum 0": 0.53,
    "discounted_sum 0.5": 0.61,
    "discounted_sum 0.9": 0.68,
    "discounted_sum 0.99": 0.68,
    "discounted_sum 0.999": 0.68,
}
