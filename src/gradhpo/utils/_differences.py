"""What differs between what was asked for and what is asked for."""

from typing import Any

__all__ = ["differences"]


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`name: old -> new` of all that differs between two JSON values.

    >>> differences({"T": 20, "outer": {"rate": 0.1}}, {"T": 20, "outer": {"rate": 0.2}})
    ['outer.rate: 0.1 -> 0.2']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys((*before, *now)))
        return [
            line
            for name in names
            for line in differences(
                before.get(name, _MISSING), now.get(name, _MISSING), f"{path}.{name}".strip(".")
            )
        ]
    return [] if before == now else [f"{path}: {_shown(before)} -> {_shown(now)}"]


_MISSING = object()


def _shown(value: Any) -> str:
    text = "(nothing)" if value is _MISSING else str(value)
    text = text if text.isprintable() else ascii(text)  # it may come from anywhere
    return text if len(text) <= 200 else f"{text[:200]} ..."
