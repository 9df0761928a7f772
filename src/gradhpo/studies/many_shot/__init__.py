"""Many-shot meta-learning: one short training after another, each on ten classes of its own.

A task is ten classes of a labelled set, half of their examples to train on and half to validate.
Meta-training goes through a meta-batch of tasks at a time, T steps of SGD with momentum each; the
hyperparameters follow a hypergradient while it trains, by FO, one-step and HyperDistill online, by
implicit differentiation at the last steps, by DrMAD at the end. Weights begin at phi, the mean of
what the last tasks have left behind (Reptile). What counts is how well tasks of other classes are
learned from phi in T steps, the hyperparameters held.

What the hyperparameters are is the model's word: the lower layers of a network (`anil`), layers
between those of the task (`warpgrad`), or how much an example counts by its loss where 40 % of the
labels are random (`meta_weight_net`; FO sees nothing of it and leaves it as it begins).

Source:
    Lee et al. (2022), "Online Hyperparameter Meta-Learning with Hypergradient Distillation",
    section 5 and table 2. Which classes train and which test is ours, so are the details of the
    networks and everything about `small`.
"""

from gradhpo.studies.many_shot.study import Config, run

__all__ = ["Config", "run"]
