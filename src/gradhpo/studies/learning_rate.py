"""A learning rate per layer, learned over many short training runs from a poor first guess.

Every episode is a training run of `steps` steps from the same initial weights, starting at a
rate of 0.01. Full reverse mode has the exact hypergradient of the whole run; one-step lookahead
shows the bias of short horizons. Test data are used for reporting only. The model and the run
are in `gradhpo.examples.learning_rate`.

Source:
    The set-up is that of Maclaurin et al. (2015), section 3.1, in small; the bias is described
    by Wu et al. (2018).
"""

from dataclasses import dataclass
from pathlib import Path

from gradhpo.examples import learning_rate
from gradhpo.report import StudyResult
from gradhpo.report.config import Progress, silent
from gradhpo.studies.shared.before_after import before_after, with_paths
from gradhpo.studies.shared.images import ImageConfig

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of the study.

    >>> Config(fast=True).steps
    100
    """

    out: Path = Path("results/learning_rate")
    episodes: int = 60
    steps: int = 100


def run(config: Config, progress: Progress = silent) -> StudyResult:
    """Compare the first guess with learned rates; `accuracy.png`, `rates.png`."""
    outcome = before_after(
        "learning_rate",
        learning_rate.task,
        learning_rate.OUTER,
        config,
        ("reverse", "one_step"),
        {"fixed": learning_rate.HYPERPARAMS},
        progress,
        restarts=True,
    )
    return with_paths(outcome, "rates.png", "training run", "learning rate", "Rates", log_y=True)
