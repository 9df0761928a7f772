"""Hypergradient descent: SGD, SGD with Nesterov momentum and Adam, each with and without it.

Logistic regression or a network of 784-1000-1000-10 units on MNIST, VGG-16 with batch
normalisation and dropout on CIFAR-10 (crops and flips); minibatches of 128, an L2 penalty of
1e-4 in the gradient, eta_0 = 1e-3; beta = 1e-3 for SGD, 1e-7 for Adam (VGG: 1e-8). Validation
is on the test data, as the authors have it; nothing is chosen by it.

Besides the six methods `method` takes `prodigy`, `dadapt`, `mechanize` (around Adam) and `dog` of
`optax.contrib`, which need no learning rate either. Two sweeps answer how much eta_0 matters:

    --online-tuning   eta_0 = 1e-1 ... 1e-6, whole runs, with Adam-HD at a beta of 1e-4 too
    --grid            eta_0 and beta = 1e-1 ... 1e-6: iterations until a minibatch loss of 0.29

Source:
    Baydin et al. (2018), "Online Learning Rate Adaptation with Hypergradient Descent", section 4,
    with the settings of the authors' PyTorch code (10, 100 and 100 epochs; the text has 20, 100
    and 200). A last partial batch is left out: 468 steps per epoch of MNIST, not 469.
"""

from gradhpo.studies.hypergradient_descent.study import Config, run

__all__ = ["Config", "run"]
