"""The tutorial: 517 learning rates tuned while a small network trains, by every method.

All methods of a seed meet the same data, initial weights and batches, so their differences
are theirs. Three settings are worth a look:

    gradhpo demo                       (a) as the original tutorial sets it: plain steps of
                                       3e-3, rates from 0.05. Hypergradients are so small that
                                       all methods coincide. Then (b), `separated`.
    gradhpo run tutorial --restart --outer adam --outer-rate 0.01
        --method one_step greedy hyperdistill reverse
                                       (c) every episode starts from the initial weights, so
                                       what counts is the loss T steps later: a longer horizon
                                       pays. At --outer-rate 0.1 exact reverse mode wins.
"""

from gradhpo.studies.tutorial.study import Config, DemoConfig, demo, run, separated, train

__all__ = ["Config", "DemoConfig", "demo", "run", "separated", "train"]
