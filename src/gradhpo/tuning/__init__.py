"""A task of one's own from the command line: tuned, compared, and what was found taken home.

    gradhpo init                      a file with a task that runs
    gradhpo tune my_task:task         tune it; tables, figures, the hyperparameters to take home
    gradhpo compare my_task:task      methods and searches, each for the same number of gradients

and for programs: `compare`; `History`, a callback that keeps what happened in every episode;
`load_task` and `load_hyperparams`, the task of a command and what `gradhpo tune` has found for it.
"""

from gradhpo.tuning.comparing import compare
from gradhpo.tuning.history import History
from gradhpo.tuning.take_home import load_hyperparams
from gradhpo.tuning.target import load_task

__all__ = ["History", "compare", "load_hyperparams", "load_task"]
