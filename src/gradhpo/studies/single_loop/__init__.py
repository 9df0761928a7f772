"""Single-loop methods: one penalty per feature of a logistic regression, tuned on mini-batches.

The training loss is the logistic loss plus `exp(lam_k) w_k^2 / 2` for every feature k, with
lam = 0 at the start; the validation loss is the logistic loss. Every step draws one part of
64 examples from either side. What counts is the exact hypergradient at lam, and the
validation loss of the weights that are best for lam: both by Newton's method in float64,
outside of the time that is taken.

All methods see the same batches and spend the same budget of gradient evaluations, a
second-order product counted as two. Features are divided by their root mean square.

Steps are constant. For every method the inner rate, which is also that of its linear system,
and the outer rate are the best of the same grid, `GRID`, by the worst validation loss at the
end of five runs that are not among those reported. `RATES` holds what was found for the
default budget on ijcnn1; `tune=True` searches again, and so does a run on a9a.

Source:
    The problem is that of Pedregosa (2016), in the form of the benchmark of Dagréou et al.
    (2022), which does not scale the features and whose rates shrink with time.
"""

from gradhpo.studies.single_loop.study import Config, run

__all__ = ["Config", "run"]
