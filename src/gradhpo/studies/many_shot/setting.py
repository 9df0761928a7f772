"""The settings of the study: data, tasks, and what --small and --fast make of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gradhpo.meta.images import ManyShot, split_classes
from gradhpo.report.config import DataStudyConfig
from gradhpo.studies.shared.meta_learning import META_METHODS

__all__ = ["Config", "samples"]

SHARES = (0.5, 0.2, 0.3)  # of the classes: to train, to choose by, to test; CIFAR-100's 50, 20, 30
NOISE = 0.4  # of MetaWeightNet's tasks


@dataclass(frozen=True)
class Config(DataStudyConfig):
    """Settings of the study; the defaults are the paper's.

    Raises:
        ValueError: a number is out of range.

    >>> Config(model="warpgrad").steps
    100
    """

    out: Path = Path("results/many_shot")
    dataset: str = "cifar100"
    """A labelled set of images by its name, or the path of a folder of class folders."""
    model: Literal["anil", "warpgrad", "meta_weight_net"] = "anil"
    """What the hyperparameters are: lower layers, warp layers, weights of noisy examples."""
    small: bool = False
    """Sizes that two cores can do: images of 16 pixels, 8 channels, 60 inner-optimizations of 50
    steps, 3 seeds; larger numbers given beside it are cut to these."""
    side: int = 0
    """Pixels to shrink the images to, a divisor of their side; 0 keeps them."""
    channels: int = 32
    """Channels of every layer."""
    ways: int = 10
    """Classes of a task."""
    steps: int = 100
    """Steps of an inner-optimization, T."""
    batch_size: int = 100
    """Images of a batch."""
    episodes: int = 1000
    """Inner-optimizations of meta-training, M, each of a meta-batch of tasks."""
    meta_batch: int = 4
    """Tasks of a meta-batch."""
    outer_rate: float = 0.0
    """Rate of the hyperparameters at the start; 0: the paper's, 0.001, for MetaWeightNet 0.01, and
    0.01 for the few inner-optimizations of `small`."""
    gamma: float = 0.99
    """Discount of HyperDistill."""
    every: int = 2
    """Steps per hypergradient of the online methods; 2 explains the paper's number of products."""
    tests: int = 500
    """Tasks to test on."""
    points: int = 10
    """Points of the curves, a divisor of `episodes`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(side=0, channels=1, ways=2, batch_size=1, episodes=1, meta_batch=1)
        self._at_least(every=1, tests=1, points=1, steps=self.every)
        if self.steps % self.every:
            raise ValueError(f"steps={self.steps} is no multiple of every={self.every}.")

    @classmethod
    def known_methods(cls) -> tuple[str, ...]:
        return META_METHODS

    @property
    def rate(self) -> float:
        """Of the hyperparameters at the start."""
        higher = self.model == "meta_weight_net" or self.small or self.fast
        return self.outer_rate or (0.01 if higher else 0.001)

    @property
    def reduced(self) -> "Config":
        """With what `small` and `fast` ask for."""
        most: dict[str, int] = {}
        if self.small or self.fast:
            most = {"channels": 8, "steps": 50, "episodes": 60, "meta_batch": 2, "seeds": 3}
            most |= {"tests": 50}
        if self.fast:
            most |= {"steps": 20, "episodes": 4, "seeds": 2, "tests": 4, "points": 2}
        reduced = {name: min(getattr(self, name), n) for name, n in most.items()}
        return replace(self, **reduced, side=self.side or (16 if most else 0))


def samples(config: Config, labels: np.ndarray, side: int) -> tuple[ManyShot, ManyShot, ManyShot]:
    """Tasks to train on, to choose by and to test on, of different classes.

    Args:
        labels: Of all images.
        side: Of an image, in pixels.
    """
    fewest = int(np.bincount(labels).min())
    return tuple(
        ManyShot(
            labels,
            config.ways,
            shots=fewest // 2,
            queries=fewest // 2,
            batch_size=config.batch_size,
            steps=config.steps,
            pad=side // 8,  # 4 for images of 32 pixels
            noise=NOISE if config.model == "meta_weight_net" else 0.0,
            classes=classes.tolist(),
        )
        for classes in split_classes(labels, SHARES)
    )  # type: ignore[return-value]
