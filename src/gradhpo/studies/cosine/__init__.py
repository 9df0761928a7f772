"""How close the direction is: every method against the exact hypergradient, along meta-training.

At checkpoints of a meta-training run, from the weights and hyperparameters it has come to, tasks
are learned for T steps with the hyperparameters as they are. The exact hypergradient of these T
steps, by full reverse mode in float64, and what every method makes of the same steps are compared
by their cosine: the whole, and the indirect terms alone (what is left without dL_val/dlam).

Source:
    Lee et al. (2022), figure 3, whose network is WarpGrad on CIFAR-100 with T = 100; here it is
    that of the study `sinusoid`, and a small WarpGrad network on characters of Omniglot.
"""

from gradhpo.studies.cosine.study import Config, run

__all__ = ["Config", "run"]
