"""Learned training schedules: a learning rate and a momentum per layer and step, on MNIST.

A network 784-50-50-50-10 of tanh units is trained for 100 steps of 200 examples. What is tuned
is the loss on all 10 000 training examples at the end, by its exact hypergradient with respect
to the log learning rates and logit momenta of every step and kind of weights (100 x 8 each) and
the log scales of the initial weights (8). Every meta-iteration trains from new initial weights
on new batches.

The learned schedule then trains fresh networks with Optax alone, and is written to
`schedule.json`; `optimizer(read_schedule(path))` is the Optax optimizer.

Source:
    Maclaurin, Duvenaud & Adams (2015), section 3.1, figures 2 to 5; MNIST with its mean image
    subtracted. The published meta-optimizer is an Adam of rate 0.04 whose averaging of first
    moments fades after the first step; `meta="published"` is the usual Adam of that rate, the
    default has rate 0.08 and forgets second moments sooner.
"""

from gradhpo.studies.schedule.export import optimizer, read_schedule
from gradhpo.studies.schedule.problem import Schedule
from gradhpo.studies.schedule.study import Config, run

__all__ = ["Config", "Schedule", "optimizer", "read_schedule", "run"]
