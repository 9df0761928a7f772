"""The methods as classes: constructor and docstring; the mathematics is in `estimators`.

`EstimatorOptimizer` is the class to derive from, `register` makes a method known by its name.
"""

from gradhpo.algorithms._facade import EstimatorOptimizer
from gradhpo.algorithms.registry import METHODS, Example, Method, Summary, register

__all__ = ["METHODS", "EstimatorOptimizer", "Example", "Method", "Summary", "register"]
