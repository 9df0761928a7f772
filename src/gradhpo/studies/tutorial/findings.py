"""What the tutorial's numbers say, in words computed from them."""

from collections.abc import Mapping

import numpy as np

from gradhpo.report import interval, paired
from gradhpo.studies.tutorial.problem import Outcome

__all__ = ["LITERAL", "best_episode", "findings"]

LITERAL = "greedy (seed's literal call)"
COINCIDE = 1e-3  # losses closer than this on every seed rank nothing


def best_episode(outcomes: Mapping[str, Outcome]) -> str:
    """A line per method: the loss of the best episode, and its paired difference to fixed.

    >>> one = Outcome(np.array([[2.0, 1.0], [1.5, 3.0]]), np.zeros((2, 3)), np.zeros((2, 0)))
    >>> print(best_episode({"fixed": one}))
    best val_loss of the 2 episodes, mean and 95 % interval, paired difference to fixed
      fixed  1.2500 [-1.9266, 4.4266]
    """
    best = {name: outcome.losses.min(axis=1) for name, outcome in outcomes.items()}
    episodes = next(iter(outcomes.values())).losses.shape[1]
    width = max(map(len, best))
    lines = [
        f"best val_loss of the {episodes} episodes, mean and 95 % interval, "
        "paired difference to fixed"
    ]
    for name, losses in best.items():
        summary = interval(losses)
        line = (
            f"  {name:{width}}  {summary.mean:.4f} [{summary.ci95[0]:.4f}, {summary.ci95[1]:.4f}]"
        )
        if name != "fixed":
            change = paired(losses, best["fixed"])
            low, high = change.ci95
            line += f"  {change.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(line)
    return "\n".join(lines)


def findings(outcomes: Mapping[str, Outcome]) -> str:
    """A sentence or a few, a line each, on what a setting shows.

    Args:
        outcomes: By method, "fixed" among them.
    """
    fixed = outcomes["fixed"]
    tuned = {n: o for n, o in outcomes.items() if n not in ("fixed", LITERAL)}
    said = []
    if tuned:
        spread = max(np.abs(o.score - fixed.score).max() for o in tuned.values())
        said.append(_coincidence(spread, tuned) if spread < COINCIDE else _ranking(fixed, tuned))
    if "fo" in tuned:
        off = np.abs(tuned["fo"].losses - fixed.losses).max()
        said.append(
            "fo equals fixed bit for bit: the validation loss does not contain learning rates."
            if off == 0
            else f"fo tunes nothing here, yet its losses differ from fixed by up to {off:.2g}: "
            "two programs that round differently."
        )
    if "hyperdistill" in tuned:
        said.append(_theta(tuned["hyperdistill"].theta_fits))
    if LITERAL in outcomes:
        literal = outcomes[LITERAL]
        said.append(
            f"{LITERAL} is a footnote: it trains {5 * literal.losses.shape[1]} steps at a rate of "
            f"0.01 that nothing tunes; its hyperparameters move by {np.abs(literal.moved).max():g}."
        )
    return "\n".join(said)


def _coincidence(spread: float, tuned: Mapping[str, Outcome]) -> str:
    moved = max(np.abs(o.moved).max() for o in tuned.values())
    return (
        f"All methods coincide: none is farther than {spread:.1e} from fixed on any seed, no "
        f"learning rate moves by more than {moved:.1e}. This setting cannot rank methods."
    )


def _ranking(fixed: Outcome, tuned: Mapping[str, Outcome]) -> str:
    changes = {name: paired(o.score, fixed.score) for name, o in tuned.items()}
    order = sorted(changes, key=lambda name: np.nan_to_num(changes[name].mean, nan=np.inf))
    gains = [f"{name} {changes[name].mean:+.4f}" for name in order]
    text = f"Against fixed: {', '.join(gains)}."
    if "hyperdistill" in tuned and "one_step" in tuned:
        change = paired(tuned["hyperdistill"].score, tuned["one_step"].score)
        low, high = change.ci95
        verdict = "loses to" if low > 0 else "beats" if high < 0 else "cannot be told from"
        text += f" hyperdistill {verdict} one_step by {change.mean:+.4f} [{low:+.4f}, {high:+.4f}]."
    return text


def _theta(fits: np.ndarray) -> str:
    first, last = fits[:, 0].mean(), fits[:, -1].mean()
    rejected = int((~(fits > 0)).sum())
    return (
        f"hyperdistill's fitted theta goes from {first:.3f} to {last:.3f} on average, and "
        f"{rejected} of {fits.size} fits are not positive: the guard keeps the one before."
    )
