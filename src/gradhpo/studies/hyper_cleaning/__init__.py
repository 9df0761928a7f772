"""Data hyper-cleaning: one weight per training example, learned from clean validation data.

Half of the training labels are replaced by random classes (nine tenths of those are then wrong).
Example i counts with weight sigmoid(lam_i), lam = 0 at the start, in the mean training loss of a
small convolutional network; the weights follow the gradient of the validation loss while the
network trains. Test data are used for reporting only.

Source:
    "Generalized Greedy Gradient-Based Hyperparameter Optimization" (under review, ICLR 2025),
    table 2. It prints the sum of the losses, which diverges at its rates; the mean is meant.
    It validates on the test data that its accuracies are reported on; so does `leaking=True`,
    and with the default we do not. Its one-step method moves the weights once per 10 training
    steps, ours after every step, so that all methods spend the same number of products.
    Strides, initial weights and the size of the validation set are ours.
"""

from gradhpo.studies.hyper_cleaning.study import Config, Detection, detection, run

__all__ = ["Config", "Detection", "detection", "run"]
