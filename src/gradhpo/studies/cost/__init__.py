"""What the methods of online meta-learning cost: memory, arithmetic and time.

For ANIL, WarpGrad and MetaWeightNet and every method: the operations of one training step with its
outer update, and of one inner-optimization on one task operations, seconds and temporary memory;
the memory again for T = 10, 100 and 1000. The images are noise, on which nothing of it depends.

Source:
    Lee et al. (2022), table 3, by a GPU's allocator and with a meta-batch; here it is what the
    compiled program allocates for one task, so ratios are what can be compared.
"""

from gradhpo.studies.cost.study import Config, run

__all__ = ["Config", "run"]
