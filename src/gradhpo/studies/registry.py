"""The studies by name. Nothing is imported until a study is loaded."""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

__all__ = ["STUDIES", "Study", "load"]


class Study(NamedTuple):
    """Where a study lives and what it shows.

    Its module holds a frozen dataclass `Config`, usually a subclass of
    `gradhpo.report.config.StudyConfig`, and `run(config, progress=silent) -> StudyResult`.
    """

    module: str
    description: str  # one line, shown by `gradhpo list`


STUDIES: dict[str, Study] = {
    "tutorial": Study(
        "gradhpo.studies.tutorial",
        "one learning rate per weight of a small network, tuned by each method (the tutorial)",
    ),
    "hyper_cleaning": Study(
        "gradhpo.studies.hyper_cleaning",
        "one weight per training example finds the wrong labels in a corrupted training set",
    ),
    "hyper_cleaning_projected": Study(
        "gradhpo.studies.hyper_cleaning_projected",
        "hyper-cleaning with a bound on the sum of the weights, kept by projection",
    ),
    "mixed": Study(
        "gradhpo.studies.mixed",
        "activation, width, rates, penalties and dropout together, beside random search and TPE",
    ),
    "crossover": Study(
        "gradhpo.studies.crossover",
        "from how many hyperparameters on gradients win over random search, TPE and CMA-ES",
    ),
    "feature_selection": Study(
        "gradhpo.studies.feature_selection",
        "a penalty per feature and an L1 price on each: which of many features say nothing",
    ),
    "sparse": Study(
        "gradhpo.studies.sparse",
        "weights of examples moved a few at a time, against all at once",
    ),
    "meta_weight_net": Study(
        "gradhpo.studies.meta_weight_net",
        "the weight of an example as a function of its loss, and what momentum hides from one step",
    ),
    "regularisation": Study(
        "gradhpo.studies.regularisation",
        "a penalty per layer of a small classifier, tuned online, then used in fresh training",
    ),
    "learning_rate": Study(
        "gradhpo.studies.learning_rate",
        "a learning rate per layer, learned over restarted runs from a start far too low",
    ),
    "augmentation": Study(
        "gradhpo.studies.augmentation",
        "the strength of data augmentation, learned from the validation loss",
    ),
    "image_training": Study(
        "gradhpo.studies.image_training",
        "schedule, decay, smoothing and augmentation of a small network on photographs, beside TPE",
    ),
    "single_loop": Study(
        "gradhpo.studies.single_loop",
        "a penalty per feature of a logistic regression, by single-loop methods on mini-batches",
    ),
    "hypergradient_descent": Study(
        "gradhpo.studies.hypergradient_descent",
        "learning rates tuned by the training gradient: SGD, SGDN, Adam with and without it",
    ),
    "schedule": Study(
        "gradhpo.studies.schedule",
        "learning rates and momenta of every layer and step, learned by reversing training",
    ),
    "distill_data": Study(
        "gradhpo.studies.distill_data",
        "ten training images, one per class, learned pixel by pixel",
    ),
    "regularisation_map": Study(
        "gradhpo.studies.regularisation_map",
        "a penalty for every weight of logistic regression, as an image",
    ),
    "chaos": Study(
        "gradhpo.studies.chaos",
        "where training is chaotic the derivative by the learning rate explodes",
    ),
    "sinusoid": Study(
        "gradhpo.studies.sinusoid",
        "few-shot regression: a representation learned online over many inner-optimizations",
    ),
    "maml": Study(
        "gradhpo.studies.maml",
        "initial weights that fit a new sinusoid after one step: MAML, FOMAML, Meta-SGD, Reptile",
    ),
    "omniglot": Study(
        "gradhpo.studies.omniglot",
        "layers shared by few-shot tasks of characters: short horizons on five steps of training",
    ),
    "cosine": Study(
        "gradhpo.studies.cosine",
        "every method's direction against the exact hypergradient, along meta-training",
    ),
    "toy": Study(
        "gradhpo.studies.toy",
        "two weights that follow two hyperparameters: short horizons against the exact one",
    ),
    "many_shot": Study(
        "gradhpo.studies.many_shot",
        "layers or example weights meta-learned online over ten-way tasks of many images",
    ),
    "two_stage": Study(
        "gradhpo.studies.two_stage",
        "weights of noisy examples learned on one half, then training on all with them held",
    ),
    "cost": Study(
        "gradhpo.studies.cost",
        "memory, arithmetic and time of the methods of online meta-learning",
    ),
    "check": Study(
        "gradhpo.studies.check",
        "how far each method is from the exact hypergradient on five small problems, and its cost",
    ),
}


def load(name: str) -> ModuleType:
    """Import the module of a study.

    Raises:
        ValueError: no study has this name; the message lists those that exist.
        ImportError: the study needs a package that is not installed.

    >>> load("tutorials")
    Traceback (most recent call last):
    ...
    ValueError: unknown study 'tutorials'; known: tutorial, hyper_cleaning, \
hyper_cleaning_projected, mixed, crossover, feature_selection, \
sparse, meta_weight_net, regularisation, learning_rate, augmentation, \
image_training, single_loop, hypergradient_descent, schedule, distill_data, regularisation_map, \
chaos, sinusoid, maml, omniglot, cosine, toy, many_shot, two_stage, cost, check.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; known: {', '.join(STUDIES)}.")
    return import_module(STUDIES[name].module)
