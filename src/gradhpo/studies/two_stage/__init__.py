"""Two stages: weights of noisy examples learned on halves of a set, then training on all of it.

Part of the labels of a set of images is replaced by random ones. First a network is trained on one
half, each example weighted by MetaWeightNet according to its loss, while the weight net follows the
hypergradient of the loss on the other half: one long training, of one network. Then the weight net
is held, and a fresh network is trained on both halves. Its accuracy on test images is what counts.

The validation half keeps its right labels, as in MetaWeightNet; `noisy_val` replaces them as well.
The paper does not say which, and its accuracies look like those of a set that is noisy throughout.

Source:
    Lee et al. (2022), appendix H and table 5.
"""

from gradhpo.studies.two_stage.study import Config, run

__all__ = ["Config", "run"]
