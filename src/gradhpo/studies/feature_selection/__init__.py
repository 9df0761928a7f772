"""Which features matter? A penalty for every one, and a price of the outer problem on each scale.

To the features of a data set come 200 that say nothing: columns of its own, each shuffled. Logistic
regression on x * s has a scale s_i >= 0 for every feature, so that the ridge penalty `rho |w|^2` is
one of rho / s_i^2 on the weight of feature i. Scales and rho follow the hypergradient of

    validation loss + c sum_i s_i

by proximal Adam, which takes most scales to exactly 0. Beside it the same model with all scales 1
(`ridge`), and the elastic net, its two numbers found by random search and TPE with as many
gradients.
"""

from gradhpo.studies.feature_selection.study import Config, run

__all__ = ["Config", "run"]
