"""Schedule, decay, label smoothing and augmentation of a small network on photographs.

Beside hyperparameters that were tuned by hand, and beside a search, at equal gradients.
"""

from gradhpo.studies.image_training.study import Config, run

__all__ = ["Config", "run"]
