"""`gradhpo init`: a short file with a task that runs, to be changed into one's own."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

__all__ = ["InitConfig", "write_starter"]


@dataclass(frozen=True)
class InitConfig:
    """Write a file with a task that runs: a network on handwritten digits, in plain JAX or with a
    library of networks. It needs the extra `data`."""

    file: Positional[Path] = Path("my_task.py")
    """The file to write; its name without .py is the name of the module."""
    flax: Literal["nnx", "linen"] | None = None
    """With Flax."""
    equinox: bool = False
    """With Equinox."""
    plain: bool = False
    """In plain JAX, as by default."""

    def __post_init__(self) -> None:
        if bool(self.flax) + self.equinox + self.plain > 1:
            raise ValueError("choose one of --flax, --equinox and --plain.")
        if not self.file.stem.isidentifier() or self.file.suffix != ".py":
            raise ValueError(
                f"{self.file} cannot be imported: choose a name of letters, digits and _, and .py."
            )


def write_starter(config: InitConfig) -> Path:
    """Write the file, and return its path.

    Raises:
        FileExistsError: there is one of that name.
        OSError: it cannot be written.
    """
    kind = {"nnx": "flax_nnx", "linen": "flax_linen", None: "plain"}[config.flax]
    kind = "equinox_modules" if config.equinox else kind
    text = files(__name__).joinpath(f"{kind}.py").read_text("utf-8")
    try:
        with config.file.open("x", encoding="utf-8") as file:
            file.write(text.replace("{module}", config.file.stem))
    except FileExistsError:
        raise FileExistsError(f"{config.file} exists already; choose another name.") from None
    return config.file
