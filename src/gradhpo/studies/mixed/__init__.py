"""Choices and numbers tuned together: a network's activation and width, rates, penalties, dropout.

The choices are relaxed to mixtures, and all hyperparameters follow the exact hypergradient; then
the choices of the largest weights are held, and the numbers go on. Beside it random search and TPE
(Akiba et al. 2019, Optuna) with as many gradient evaluations and more, and the best of all nine
choices, each with its numbers tuned for longer: the discrete optimum, by enumeration.

The relaxation is that of DARTS (Liu, Simonyan, Yang 2019), with hypergradients through all of
training in the place of one step.
"""

from gradhpo.studies.mixed.study import Config, run

__all__ = ["Config", "run"]
