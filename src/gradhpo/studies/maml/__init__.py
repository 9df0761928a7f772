"""Learned initial weights: a network that fits a new sinusoid after one step of gradient descent.

A task is a sinusoid of random amplitude and phase, seen at 5, 10 or 20 points. What is learned over
many tasks are the weights of a network 1-40-40-1 that training begins from. Judged is the error on
1000 new tasks after 1 to 10 steps of gradient descent on their points.

    maml       the exact derivative of the loss after one step   learned, reverse(1)
    fomaml     the same without the second derivative            learned, discounted_sum(1.0, 1)
    meta_sgd   maml, with a learned rate for every weight        learned, reverse(1)
    reptile    the mean of the weights after five steps          carried, lr_reptile=0.1

All see the same tasks. Reptile has no validation loss, so it trains on the points of both sides.

Source:
    Finn et al. (2017), section 5.1: rate 0.01, Adam 0.001, 25 tasks a meta-step, 70 000 meta-steps
    in the authors' code; Li et al. (2017) have 4 tasks and 60 000. Nichol et al. (2018) for
    Reptile, whose rate of 0.02 diverges on this network: it has 0.01 too. Initial weights are ours.
"""

from gradhpo.studies.maml.study import Config, run

__all__ = ["Config", "run"]
