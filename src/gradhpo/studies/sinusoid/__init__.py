"""Few-shot regression of sinusoids: a representation learned online over many short trainings.

A task is a sinusoid of random amplitude and phase, of which ten points are seen. The head of a
network 1-100-100-100-1 learns it in T = 30 steps; the three layers under the head are the
hyperparameters, moved at every one of these steps by the method. Heads go on from the mean of the
last ten (Reptile at rate 1). Judged is the error on 1000 tasks that no method has seen, each
learned in 30 steps from there, with the layers as they are.

Source:
    Lee, Lee, Shin, Yang, Hospedales & Hwang (2022), "Online Hyperparameter Meta-Learning with
    Hypergradient Distillation", appendix G (table 4, figure 8) and, for gamma, figures 6 and 11.
    Not said there and chosen here, because the published numbers then come out: ten validation
    points, new ones at every step; PyTorch's initial weights; gamma 0.99; that theta's fit and
    DrMAD carry alpha through A = I - eta H, ignoring the velocity (`slots="ignored"`); that
    "M = 30 inner-optimizations" are 30 meta-batches of ten.
"""

from gradhpo.studies.sinusoid.study import Config, run

__all__ = ["Config", "run"]
