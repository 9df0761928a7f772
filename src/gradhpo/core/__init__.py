"""The mechanism every method shares: dynamics, problem, estimator, state, loop."""
