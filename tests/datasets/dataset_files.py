"""Small files in the official formats, written where a test asks for them."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def png(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG") -> bytes:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.fromarray(pixels.astype(np.uint8))
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind)
    return stream.getvalue()


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


CONTAINERS = {
    "folder": write_tree,
    "zip": lambda folder, files: write_zip(folder / "any name", files),
    "tar": lambda folder, files: write_tar(folder / "data.tar", files, "w:"),
    "tar.gz": lambda folder, files: write_tar(folder / "data.tgz", files, "w:gz"),
    "tar.bz2": lambda folder, files: write_tar(folder / "data", files, "w:bz2"),
    "tar.xz": lambda folder, files: write_tar(folder / "x.tar.xz", files, "w:xz"),
}

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(256, size=(5, 4, 3))
LABELS = np.array([3, 0, 9, 1, 1])


def idx_files(suffix="") -> dict[str, bytes]:
    compress = COMPRESS[suffix]
    parts = {"train": slice(0, 3), "t10k": slice(3, 5)}
    return {
        f"{part}-{kind}-ubyte{suffix}": compress(idx_bytes(array[rows]))
        for part, rows in parts.items()
        for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS))
    }


def records(labels, label_bytes, seed=0):
    """`(bytes, images)` of CIFAR records whose coarse labels, if any, are 0."""
    images = np.random.default_rng(seed).integers(256, size=(len(labels), 32, 32, 3))
    rows = [
        bytes([0] * (label_bytes - 1) + [label]) + image.transpose(2, 0, 1).astype("u1").tobytes()
        for label, image in zip(labels, images, strict=True)
    ]
    return b"".join(rows), images


def omniglot_tree(part="images_background", alphabets=("Latin", "Greek"), number=0):
    tree, ink = {}, np.full((105, 105), 255)
    for alphabet in alphabets:
        for character in (1, 2):
            number += 1
            for drawer in (1, 2, 10):
                image = ink.copy()
                image[:, : 10 * number + drawer] = 0
                path = f"{part}/{alphabet}/character{character:02}/{number:04}_{drawer:02}.png"
                tree[path] = png(image, "1")
    return tree
