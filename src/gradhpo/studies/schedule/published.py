"""The losses of Maclaurin et al. (2015), read from the vector figures of the paper."""

__all__ = ["EVERY", "INITIAL", "LEARNED", "META_CURVE", "STEPS"]

EVERY = 5
# The final training loss at every fifth meta-iteration.
META_CURVE = (0.483, 0.269, 0.233, 0.209, 0.192, 0.161, 0.152, 0.137, 0.121, 0.123, 0.112)
# The training loss by step, with the initial and with the learned schedule.
STEPS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
INITIAL = (2.302, 2.292, 2.276, 2.209, 1.911, 1.44, 1.027, 0.851, 0.74, 0.664, 0.593)
LEARNED = (2.378, 1.067, 0.531, 0.433, 0.313, 0.277, 0.219, 0.183, 0.167, 0.147, 0.138)
