"""Two weights that follow two hyperparameters: how far short horizons fall behind.

    L_val = ||w||^2 + 10 ||sin w||^2,    L_train = (w - lam)^T diag(1, 1/2) (w - lam) / 2

Source:
    "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025),
    figure 2. Its text has both rates at 0.1 and horizons of 5 and 20; its curves, read from the
    vector graphics, are those of an inner rate of 0.2, an outer rate of 1e-4, horizons of 5 and
    10, and weights that go on from one outer step to the next. Its cosines are to the exact
    hypergradient of another run, the one that follows it, at the same outer step; beside them
    stand those to the exact hypergradient at the same state, which tell direction from progress.
"""

from gradhpo.studies.toy.study import Config, run

__all__ = ["Config", "run"]
