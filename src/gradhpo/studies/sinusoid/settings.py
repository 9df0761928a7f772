"""The settings of the study `sinusoid`, the methods by name, and the rows of its table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gradhpo.core.delay import update_every, update_last
from gradhpo.core.estimator import Estimator
from gradhpo.estimators.discounted_sum import discounted_sum
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.drmad import drmad
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse
from gradhpo.solvers import neumann
from gradhpo.studies.sinusoid.problem import RATE

__all__ = ["METHODS", "SETTINGS", "Row", "Setting", "rows", "seen"]

COMPARED = ("fo", "one_step", "drmad", "implicit_neumann", "hyperdistill")
ONLINE = ("fo", "one_step", "hyperdistill")
GAMMAS = (0.0, 0.3, 0.6, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Setting:
    """What is varied. The defaults are those with which the published numbers come out."""

    steps: int = 30  # T, of an inner-optimization
    episodes: int = 30  # M, of ten inner-optimizations each
    outer_rate: float = 1e-3  # of Adam
    momentum: float = 0.9  # of training
    slots: str = "ignored"  # by HyperDistill's fit and by DrMAD
    gamma: float = 0.99
    theta: float | None = None  # None: fitted before the first episode and every 50 episodes
    guard: bool = True  # against a fitted theta that no training which forgets explains
    fresh: bool = True  # new validation points at every step
    every: int = 1  # windows of a method between two updates
    seeds: int = 10
    methods: tuple[str, ...] = ONLINE


SETTINGS: dict[str, Setting] = {
    "published": Setting(seeds=20, methods=COMPARED),
    "strong": Setting(episodes=100, outer_rate=3e-4, methods=COMPARED),
    "full_jacobian": Setting(slots="differentiated", methods=(*ONLINE, "drmad")),
    "unguarded": Setting(slots="differentiated", guard=False),
    "theta_0.3": Setting(theta=0.3),
    "theta_0.66": Setting(theta=0.66),
    "no_momentum": Setting(momentum=0.0),
    "short": Setting(steps=10),
    "long": Setting(steps=100),
    "fixed_queries": Setting(fresh=False),
}

OTHERS = ("published", *(name for name in SETTINGS if name not in ("published", "strong")))
"""The other sides of the coin, and what they are to be held against."""


def _online(make: Callable[..., Estimator]) -> Callable[..., Estimator]:
    return lambda setting, gamma, theta: update_every(make(setting, gamma, theta), setting.every)


METHODS: dict[str, Callable[[Setting, Any, Any], Estimator]] = {
    "fo": _online(lambda setting, gamma, theta: first_order()),
    "one_step": _online(lambda setting, gamma, theta: one_step()),
    "drmad": lambda setting, gamma, theta: drmad(setting.steps, slots=setting.slots),
    "implicit_neumann": lambda setting, gamma, theta: update_last(
        implicit(1, neumann(3, RATE)), 5, setting.steps
    ),
    "hyperdistill": _online(
        lambda setting, gamma, theta: hyperdistill(
            gamma, theta=theta, slots=setting.slots, theta_guard=setting.guard
        )
    ),
    "greedy": lambda setting, gamma, theta: greedy(gamma, setting.steps),
    "discounted_sum": lambda setting, gamma, theta: discounted_sum(gamma, setting.steps),
    "reverse": lambda setting, gamma, theta: reverse(setting.steps),
}
"""Name -> `(setting, gamma, theta) -> method` for one task. The numbers come apart from the
setting, because in a program they are arguments; theta=None fits it."""


def seen(method: str, setting: Setting) -> Setting:
    """The setting without what the method does not look at.

    >>> seen("fo", SETTINGS["theta_0.3"]) == seen("fo", SETTINGS["published"])
    True
    """
    plain, unseen = Setting(), {"seeds", "methods"}
    if method != "hyperdistill":
        unseen |= {"theta", "guard"}
        if method not in ("greedy", "discounted_sum"):
            unseen.add("gamma")
        if method != "drmad":
            unseen.add("slots")
    elif setting.theta is not None:
        unseen |= {"guard", "slots"}
    return replace(setting, **{name: getattr(plain, name) for name in unseen})


class Row(NamedTuple):
    """One line of the table."""

    name: str
    method: str
    setting: Setting
    baseline: str  # the row of one_step in the same setting


def rows(chosen: str, methods: tuple[str, ...] = (), **shared: Any) -> list[Row]:
    """What is run, in the order of the table.

    Args:
        chosen: A name of `SETTINGS`, "gamma" or "others".
        methods: Instead of the setting's own.
        shared: Fields of all settings.

    >>> [row.name for row in rows("theta_0.3")], len(rows("others"))
    (['fo', 'one_step', 'hyperdistill'], 30)
    """
    if chosen == "gamma":
        base = replace(Setting(), **shared)
        lines = [Row(name, name, base, "one_step") for name in ("fo", "one_step")]
        for theta in (None, 1.0):
            for gamma in GAMMAS:
                name = f"hyperdistill {gamma:g}" + (", theta 1" if theta else "")
                setting = replace(base, gamma=gamma, theta=theta)
                lines.append(Row(name, "hyperdistill", setting, "one_step"))
        return [line for line in lines if not methods or line.method in methods]
    lines = []
    for name in OTHERS if chosen == "others" else (chosen,):
        setting = replace(SETTINGS[name], **shared)
        before = f"{name}: " if chosen == "others" else ""
        for method in methods or setting.methods:
            lines.append(Row(before + method, method, setting, before + "one_step"))
    return lines
