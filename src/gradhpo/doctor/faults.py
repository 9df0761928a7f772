"""What an experiment says: a fault, or why it could not be made."""

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Fault", "Found", "Unseen"]


class Fault(NamedTuple):
    """What is wrong, or may be."""

    name: str
    says: str  # what was seen
    remedy: str
    sure: bool = True  # False: it may be meant so; methods are measured all the same

    def __str__(self) -> str:
        return f"{self.name}: {self.says}. {self.remedy}."


class Unseen(NamedTuple):
    """An experiment could not be made."""

    why: str


Found = Iterator[Fault | Unseen]
"""What an experiment finds; nothing where all is well."""
