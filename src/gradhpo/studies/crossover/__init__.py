"""From how many hyperparameters on do gradients win over searches?

One training, in which 1, 3, 10, ... 10 000 weight decays are tuned: by random search, TPE and
CMA-ES (Akiba et al. 2019, Optuna), and by hypergradients of one step, of all steps, and distilled,
each for the same number of gradients from the same start within the same box.
"""

from gradhpo.studies.crossover.study import Config, run

__all__ = ["Config", "run"]
