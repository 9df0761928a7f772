"""Data hyper-cleaning: one weight per training example, learned from clean validation data.

Part of the training labels are replaced by random classes (nine tenths of those are then wrong).
Example i counts with weight sigmoid(lam_i), lam = 0 at the start, in the mean training loss of a
small convolutional network, trained by full-batch SGD with momentum; after every T steps the
weights follow the gradient of the validation loss, and training goes on.

Source:
    "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025),
    table 2. It prints the sum of the losses, which diverges at its rates; the mean is meant.
    It validates on the whole test split, on which its accuracies are reported too. Here the first
    1000 test images validate and the others test; `val_size=10000` is the paper's choice, and
    `validation="train"` takes clean examples of the training data instead. "T1-T2" is the paper's,
    which moves the weights once per T steps, by the last of them; "one_step" moves them after
    every step. The paper does not say whether momentum goes on after an update or starts anew:
    both are run. Strides and initial weights are ours.
"""

from gradhpo.studies.hyper_cleaning.study import Config, run
from gradhpo.studies.shared.detection import Detection, detection

__all__ = ["Config", "Detection", "detection", "run"]
