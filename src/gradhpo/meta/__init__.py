"""Meta-learning: distributions of tasks, where a task begins, and how it is learned.

A distribution of tasks is a function `sample(key) -> Window`: from a PRNG key the T training and T
validation batches of one task. With a beginning it makes a task of gradhpo,

    problem = BilevelProblem(dynamics, val_loss, begin=carried(sample))
    task = Task(problem, params, hyperparams)
    tune(task, over_tasks(hyperdistill(0.99), 10), optax.adam(1e-3), episodes=30, lr_reptile=1.0)

in which every episode draws a meta-batch of ten tasks and trains on each from phi.
"""

from gradhpo.meta.episodes import adapt, carried, learned
from gradhpo.meta.sinusoids import Sinusoids

__all__ = ["Sinusoids", "adapt", "carried", "learned"]
