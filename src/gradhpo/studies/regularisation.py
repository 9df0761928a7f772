"""An L2 penalty per layer, tuned while a classifier of handwritten digits trains.

The training set is small and a fifth of its labels are replaced by random ones, so that the
penalty matters. Test data are used for reporting only. The model and the run are in
`gradhpo.examples.mnist`.

Source:
    Luketina et al. (2016), section 4, tunes one L2 penalty per layer online by T1-T2.
"""

from dataclasses import dataclass
from pathlib import Path

from gradhpo.examples import mnist
from gradhpo.report import StudyResult
from gradhpo.report.config import Progress, silent
from gradhpo.studies.shared.before_after import before_after, with_paths
from gradhpo.studies.shared.images import ImageConfig

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of the study.

    >>> Config(dataset="mnist").label_noise
    0.2
    """

    out: Path = Path("results/regularisation")
    label_noise: float = 0.2
    episodes: int = 200


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Compare the default penalties with learned ones; `accuracy.png`, `penalties.png`."""
    outcome = before_after(
        "regularisation",
        mnist.task,
        mnist.OUTER,
        config,
        ("one_step", "greedy"),
        {"fixed": mnist.HYPERPARAMS},
        progress,
    )
    return with_paths(outcome, "penalties.png", "episode", "L2 penalty", "Penalties", log_y=True)
