"""The strength of data augmentation, learned through differentiable resampling.

Rotation, shift, scale and noise of the training images of a small training set. The learned
strengths are compared with no augmentation (`none`) and with those of the start (`fixed`). Test
data are used for reporting only. The model, the resampling and the run are in
`gradhpo.examples.augmentation`.

Source:
    Learning augmentation by online bilevel optimization: Mounsaveng et al. (2021), "Learning Data
    Augmentation with Online Bilevel Optimization for Image Classification".
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from gradhpo import datasets
from gradhpo.examples import augmentation
from gradhpo.report import StudyResult, plots
from gradhpo.report.config import Progress, silent
from gradhpo.studies.shared.before_after import before_after, with_paths
from gradhpo.studies.shared.images import ImageConfig, parts

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of the study.

    >>> Config().train_size
    200
    """

    baselines = ("none", "fixed")

    out: Path = Path("results/augmentation")
    train_size: int = 200
    episodes: int = 30
    steps: int = 300


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Compare none with learned augmentation; `accuracy.png`, `strengths.png`, `images.png`."""
    before = {"none": augmentation.NO_AUGMENTATION, "fixed": augmentation.HYPERPARAMS}
    outcome = before_after(
        "augmentation",
        augmentation.task,
        augmentation.OUTER,
        config,
        ("reverse",),
        before,
        progress,
        restarts=True,
        fast_episodes=8,
    )
    result = with_paths(outcome, "strengths.png", "episode", "strength", "Strengths")
    if not outcome.paths:
        return result
    curves = next(iter(outcome.paths.values()))
    strength = {name: float(curve[:, -1].mean()) for name, curve in curves.items()}
    images = {"images.png": lambda path: _draw(config, strength, path)}
    return replace(result, files={**result.files, **images})


def _draw(
    config: Config, strength: dict[str, float], path: Path, rows: int = 4, columns: int = 8
) -> None:
    """In each row an image as it is, then as the network gets to see it."""
    data = datasets.load(config.dataset, config.data_dir)
    images = parts(data, config, seed=0).train.inputs[:rows]
    augment = jax.jit(jax.vmap(augmentation.augment, (None, 0, None)))
    seeds = np.arange(columns - 1)
    grid = np.array([[image, *augment(image, seeds, strength)] for image in images])[..., 0]
    plots.images(grid.clip(0, 1), path)
