"""The other spelling of `gradhpo.algorithms.t1t2`, public by contract."""

from gradhpo.algorithms.t1t2 import T1T2Optimizer

__all__ = ["T1T2Optimizer"]
