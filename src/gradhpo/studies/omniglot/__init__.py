"""Few-shot recognition of characters: half of the layers of a network are shared by all tasks.

A task are some characters of Omniglot, each seen once. A network of six convolutional layers
learns them in five steps: its layers 1, 3, 5 and the linear layer at its end are the weights w,
which start anew at every task, layers 2, 4, 6 the hyperparameters, which follow a hypergradient
from task to task. Judged is the accuracy on tasks of characters that were never trained on.

    fo                 the direct derivative at the last step alone          no product
    one_step           and how the last step depends on the layers           1
    implicit_neumann   as if the five steps had ended training: IFT(2)       4, 5 by their count
    greedy             the discounted sum of such terms of all steps         5
    reverse            exact: through the five steps                         5

All see the same tasks, one for every update.

Source:
    "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025),
    table 3. Not said there and chosen here: strides, batch norm (by the batch at hand), PyTorch's
    initial weights, one task an update, and that every task starts from the same random weights;
    with weights carried on from task to task all methods stay at chance.
"""

from gradhpo.studies.omniglot.study import Config, run

__all__ = ["Config", "run"]
