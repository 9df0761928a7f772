"""MetaWeightNet on images with wrong labels, and why short horizons need a virtual step.

A small network is trained on images of which two fifths have a label drawn at random. The weight
of an example is a function of its loss, a network 1 - 200 - 1 (`gradhpo.meta.MetaWeightNet`) whose
weights follow the loss on few clean images after every training step.

Always shown beside it: training that takes all labels as they are (`untouched`), the same stopped
where the clean images are classified best (`stopped`), training on the clean images alone
(`clean`) and on both together (`mixed`). Early stopping and the clean images take most of what is
to be gained.

One step of SGD with momentum mu does a share 1 - mu of its work at once. Methods that look one
step ahead judge an example by that share, and may come to the opposite conclusion: with an outer
rate of 1e-3 the weights of wrong labels rise (`trap`). Looking ahead by a virtual step of plain
SGD at the rate that momentum has in the end, rate / (1 - mu), they see the whole (`..._virtual`).

Source:
    Shu et al. (2019), "Meta-Weight-Net". Data, network and rates are ours.
"""

from gradhpo.studies.meta_weight_net.study import Config, run

__all__ = ["Config", "run"]
