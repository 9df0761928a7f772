"""Images in folders named after their class: `[<split>/]<class>/<file>.png`."""

import hashlib
import io
from os import PathLike
from pathlib import Path, PurePosixPath

import numpy as np

from gradhpo.core.types import DataBatch
from gradhpo.datasets.dataset import Dataset, DatasetError, scale_pixels
from gradhpo.datasets.download import require
from gradhpo.datasets.sources import Contents, by_key

__all__ = ["decode_image", "from_class_folders", "image_folder", "is_image"]

_MAX_PIXELS = 1 << 24


def is_image(path: PurePosixPath) -> bool:
    """Whether a file is a PNG or JPEG by its name."""
    return path.suffix.lower() in (".png", ".jpg", ".jpeg")


def decode_image(data: bytes, name: str, size: int | None = None, mode: str = "") -> np.ndarray:
    """Decode PNG or JPEG bytes with Pillow.

    Args:
        data: The file's contents.
        name: Its name, for messages.
        size: Side of the square to resize to (Lanczos), or None.
        mode: Pillow mode to convert to: `"L"` for grey, `"RGB"`. Empty: grey
            images become `"L"` and all others `"RGB"`.

    Returns:
        uint8 of shape (height, width, 1) or (height, width, 3).

    Raises:
        DatasetError: damaged, more than 8 bits deep, or declares more than
            2^24 pixels.
    """
    image_module = require("PIL.Image")
    try:
        image = image_module.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"it declares {image.width} x {image.height} pixels")
        if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
            raise ValueError("it has more than 8 bits per pixel")
        image = image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB"))
        if size is not None:
            image = image.resize((size, size), image_module.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DatasetError(f"Cannot decode image {name}: {error}.") from error
    return np.asarray(image).reshape(image.height, image.width, -1)


def from_class_folders(name: str, contents: Contents) -> Dataset:
    """Make a data set of the images in class folders.

    Labels number the class folders of all splits in alphabetical order (in
    numerical order if all are numbers). Folders `train` and `test` above the
    class folders are the splits; without them all images are for training.

    Raises:
        DatasetError: no such images, or images of different shapes.
    """
    paths = [p for p in contents.entries if is_image(p) and len(p.parts) >= 2]
    paths = sorted(by_key(paths, lambda p: p.parts[-3:]).values())
    classes = {p.parent.name for p in paths}
    numeric = all(c.isdecimal() for c in classes)
    class_names = tuple(sorted(classes, key=int if numeric else None))
    label_of = {c: i for i, c in enumerate(class_names)}
    splits = {p: p.parts[-3] if len(p.parts) >= 3 else "" for p in paths}
    split_names = {s for s in splits.values() if s in ("train", "test")}

    def batch(chosen: list[PurePosixPath]) -> DataBatch:
        images = [decode_image(contents.entries[p], str(p)) for p in chosen]
        odd = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
        if odd is not None:
            raise DatasetError(
                f"{chosen[odd]} has shape {images[odd].shape}, {chosen[0]} {images[0].shape}."
            )
        labels = np.array([label_of[p.parent.name] for p in chosen], np.int32)
        return DataBatch(scale_pixels(np.stack(images)), labels)

    train = [p for p in paths if not split_names or splits[p] == "train"]
    test = [p for p in paths if splits[p] == "test"]
    if not train:
        raise DatasetError(
            f"{name}: found neither the official files nor images in train/<class>/ folders."
        )
    return Dataset(
        name, batch(train), batch(test) if test else None, len(class_names), contents.files,
        class_names=class_names,
    )  # fmt: skip


def image_folder(folder: str | PathLike[str], size: int | None = None) -> Dataset:
    """A folder of images of the user's own: `<folder>/[train/]<class>/**/<file>.png` or `.jpg`.

    TinyImageNet's layout is one: `train/n01443537/images/n01443537_0.JPEG`. Of a folder with a
    folder `train` in it nothing else is read.

    Args:
        folder: Where it is.
        size: Side of the squares to resize to (Lanczos); None: all must be of one shape.

    Returns:
        `train` has inputs uint8 (N, height, width, 3) from 0 to 255, grey images as RGB: such sets
        are large. `test` is None; `files` has one digest, of all names and contents.

    Raises:
        DatasetError: no folder, no images in class folders, damaged ones, or different shapes.
    """
    top = Path(folder).expanduser()
    root = top / "train" if (top / "train").is_dir() else top
    if not root.is_dir():
        raise DatasetError(f"{root} is no folder; it should hold a folder of images per class.")
    names, images, labels, digest = [], [], [], hashlib.sha256()
    for place in sorted(path for path in root.iterdir() if path.is_dir()):
        paths = sorted(path for path in place.rglob("*") if is_image(PurePosixPath(path)))
        for path in paths:
            data, name = path.read_bytes(), path.relative_to(root).as_posix()
            digest.update(name.encode() + hashlib.sha256(data).digest())
            images.append(decode_image(data, name, size, "RGB"))
            labels.append(len(names))
            if images[-1].shape != images[0].shape:
                raise DatasetError(
                    f"{path} has shape {images[-1].shape}, the first image {images[0].shape}; "
                    "size= makes all alike."
                )
        names += [place.name] * bool(paths)
    if not images:
        raise DatasetError(f"{root} holds no images in folders named after their class.")
    batch = DataBatch(np.stack(images), np.array(labels, np.int32))
    files = {top.name: digest.hexdigest()}
    return Dataset(top.name, batch, None, len(names), files, class_names=tuple(names))
