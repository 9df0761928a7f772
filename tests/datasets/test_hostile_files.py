"""Damaged and hostile files are refused, with a message that says why."""

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from pathlib import PurePosixPath

import numpy as np
import pytest
from dataset_files import (
    idx_bytes,
    idx_files,
    omniglot_tree,
    png,
    records,
    write_tar,
    write_tree,
    write_zip,
)

from gradhpo import GradhpoWarning, datasets
from gradhpo.datasets import DatasetError, archives, idx
from gradhpo.datasets.archives import read_members
from gradhpo.datasets.class_folders import decode_image
from gradhpo.datasets.idx import parse_idx

UNSAFE = ["/etc/passwd", "../outside.bin", "a/../../outside.bin", "C:/x.bin", "a\\..\\b.bin"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("write", ["zip", "tar"])
def test_members_outside_the_archive(tmp_path, name, write):
    path = tmp_path / "cifar10" / "archive"
    files = {"data_batch_1.bin": bytes(3073), name: b"x"}
    if write == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, "w:gz")
    with pytest.raises(DatasetError, match="outside of the archive"):
        datasets.cifar10(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("data_batch_1.bin")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DatasetError, match="link or not a plain file"):
        list(read_members(path, lambda p: True))


def test_zip_symlink(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("data_batch_1.bin")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DatasetError, match="link or not a plain file"):
        list(read_members(path, lambda p: True))


def test_hidden_members_are_passed_over(tmp_path):
    write_zip(tmp_path / "a.zip", {"._b.bin": b"1", "__MACOSX/b.bin": b"2", "b.bin": b"3"})
    assert list(read_members(tmp_path / "a.zip", lambda p: True)) == [
        (PurePosixPath("b.bin"), b"3")
    ]


def test_zip_that_declares_ten_gigabytes(tmp_path):
    write_zip(tmp_path / "a.zip", {"data_batch_1.bin": b"x" * 100})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 0xFFFFFFFE)  # uncompressed size
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DatasetError, match="declares 4294967294 bytes"):
        list(read_members(tmp_path / "a.zip", lambda p: True))


def test_tar_that_declares_ten_gigabytes(tmp_path):
    info = tarfile.TarInfo("data_batch_1.bin")
    info.size = 10 << 30
    (tmp_path / "a.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(DatasetError, match="declares 10737418240 bytes"):
        list(read_members(tmp_path / "a.tgz", lambda p: True))


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_decompression_bomb(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "LIMIT", 1 << 20)
    compress = {"gz": gzip.compress, "xz": lzma.compress}[suffix]
    path = tmp_path / f"train.bin.{suffix}"
    path.write_bytes(compress(bytes((1 << 20) + 1)))
    with pytest.raises(DatasetError, match="more than 1048576 bytes"):
        list(read_members(path, lambda p: True))
    path.write_bytes(compress(bytes(1 << 20)))
    assert [len(data) for _, data in read_members(path, lambda p: True)] == [1 << 20]


def test_bomb_in_an_extended_tar_header(tmp_path, monkeypatch):
    """Such headers are read by `tarfile` before any member can be looked at."""
    monkeypatch.setattr(archives, "LIMIT", 1 << 20)
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 8 << 20
    data = info.tobuf(tarfile.USTAR_FORMAT) + bytes(8 << 20)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(data))
    with pytest.raises(DatasetError, match="more than 1048576 bytes"):
        list(read_members(tmp_path / "a.tgz", lambda p: True))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x08\x03\0\0\0\1",
        b"\0\0\x0d\x01" + struct.pack(">I", 1) + bytes(4),  # float32
        b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes(2),  # short
        b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes(4),  # long
        b"\0\0\x08\x01" + struct.pack(">I", 0),  # empty
        b"\0\0\x08\x03" + struct.pack(">III", 10**4, 10**4, 10**4) + bytes(9),  # 10^12
        b"\0\0\x08\xff" + b"\xff" * 1020,  # 255 dimensions
    ],
)
def test_idx_headers_that_lie(data):
    with pytest.raises(DatasetError, match="idx"):
        parse_idx(data)


@pytest.mark.filterwarnings("ignore:.*is not the official file:gradhpo.GradhpoWarning")
def test_flipped_byte_shows_both_digests(tmp_path):
    files = idx_files(".gz")
    name = "train-images-idx3-ubyte.gz"
    damaged = bytearray(files[name])
    damaged[-6] ^= 1  # in the CRC
    files[name] = bytes(damaged)
    write_tree(tmp_path / "mnist", files)
    with pytest.raises(DatasetError) as error:
        datasets.mnist(tmp_path)
    assert name in str(error.value)
    assert hashlib.sha256(damaged).hexdigest() in str(error.value)
    assert "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609" in str(error.value)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_damage_after_the_last_member_is_found(tmp_path, mode):
    """`tarfile` stops before the checksum at the end of the compressed stream."""
    path = tmp_path / "cifar10" / "a.tar"
    write_tar(path, {"data_batch_1.bin": records([1], 1)[0]}, mode)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="Cannot read"):
        datasets.cifar10(tmp_path)


@pytest.mark.parametrize("container", ["zip", "tar.gz", "tar.xz", "tar"])
def test_truncated_archives(tmp_path, container):
    path = tmp_path / "cifar10" / "a"
    files = {"data_batch_1.bin": records([1] * 9, 1)[0]}
    write = write_zip if container == "zip" else write_tar
    write(path, files, *(["w:" + container[4:]] if container != "zip" else []))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match="Cannot read"):
        datasets.cifar10(tmp_path)


def test_html_page(tmp_path):
    page = b"\n<!DOCTYPE html><html>Please log in</html>"
    write_tree(tmp_path / "mnist", idx_files() | {"train-images-idx3-ubyte": page})
    with pytest.raises(DatasetError, match="HTML page"):
        datasets.mnist(tmp_path)


def test_official_names_are_compared_with_the_official_digests(tmp_path, monkeypatch):
    """A file can be read and yet be another: here labels of another set, of equal length."""
    files, others = idx_files(".gz"), idx_files(".gz")
    name = "train-labels-idx1-ubyte.gz"
    others[name] = gzip.compress(idx_bytes(np.array([5, 6, 7])), mtime=0)
    files[name] = gzip.compress(idx_bytes(np.array([3, 0, 9])), mtime=0)
    assert len(files[name]) == len(others[name])
    known = {n: (hashlib.sha256(data).hexdigest(), len(data)) for n, data in files.items()}
    monkeypatch.setattr(idx, "_MNIST", known)
    write_tree(tmp_path / "mnist", files)
    assert datasets.mnist(tmp_path).train.targets.tolist() == [3, 0, 9]
    write_tree(tmp_path / "mnist", others)
    seen = hashlib.sha256(others[name]).hexdigest()
    with pytest.raises(DatasetError, match="It is damaged: download it again") as error:
        datasets.mnist(tmp_path)
    assert seen in str(error.value) and known[name][0] in str(error.value)
    monkeypatch.setattr(idx, "_MNIST", known | {name: (known[name][0], 60_000)})
    with pytest.warns(GradhpoWarning, match=f"{name} is not the official file of that name"):
        datasets.mnist(tmp_path)
    (tmp_path / "mnist" / "SHA256SUMS").write_text(f"{seen}  {name}\n")  # vouched for
    assert datasets.mnist(tmp_path).train.targets.tolist() == [5, 6, 7]


def test_sums_file_is_honoured(tmp_path):
    files = idx_files(".gz")
    write_tree(tmp_path / "mnist", files)
    lines = [f"{hashlib.sha256(d).hexdigest()}  mnist/{n}" for n, d in files.items()]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines))
    datasets.mnist(tmp_path)
    lines[0] = "0" * 64 + lines[0][64:]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines))
    with pytest.raises(DatasetError, match="SHA256SUMS lists 0000"):
        datasets.mnist(tmp_path)


def test_labels_out_of_range(tmp_path):
    files = idx_files() | {"t10k-labels-idx1-ubyte": idx_bytes(np.array([1, 10]))}
    write_tree(tmp_path / "mnist", files)
    with pytest.raises(DatasetError, match=r"t10k has 10 at index 1"):
        datasets.mnist(tmp_path)
    write_tree(tmp_path / "cifar10", {"data_batch_1.bin": records([0, 200], 1)[0]})
    with pytest.raises(DatasetError, match="train has 200 at index 1"):
        datasets.cifar10(tmp_path)


def test_images_and_labels_of_different_lengths(tmp_path):
    files = idx_files() | {"train-labels-idx1-ubyte": idx_bytes(np.array([1, 2]))}
    write_tree(tmp_path / "mnist", files)
    with pytest.raises(DatasetError, match="do not fit"):
        datasets.mnist(tmp_path)


@pytest.mark.parametrize("missing", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_half_a_split(tmp_path, missing):
    write_tree(tmp_path / "mnist", {k: v for k, v in idx_files().items() if k != missing})
    with pytest.raises(DatasetError, match=missing):
        datasets.mnist(tmp_path)


def test_records_of_the_wrong_length(tmp_path):
    write_tree(tmp_path / "cifar100", {"train.bin": records([1, 2], 1)[0]})
    with pytest.raises(DatasetError, match="not a multiple of 3074"):
        datasets.cifar100(tmp_path)


def test_archive_beside_its_contents_is_not_read_twice(tmp_path):
    data = {"data_batch_1.bin": records([1], 1)[0]}
    write_tree(tmp_path / "cifar10", data)
    write_tar(tmp_path / "cifar10" / "a.tar", data, "w:")
    assert len(datasets.cifar10(tmp_path).train.targets) == 1  # same path, same bytes
    write_tree(tmp_path / "cifar10" / "extracted", data)
    with pytest.raises(DatasetError, match="same file twice"):
        datasets.cifar10(tmp_path)
    write_tar(tmp_path / "cifar10" / "a.tar", {"data_batch_1.bin": bytes(3073)}, "w:")
    with pytest.raises(DatasetError, match="Two different files"):
        datasets.cifar10(tmp_path)


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    pixels = struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc + pixels


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_image_bomb(side):
    pytest.importorskip("PIL")
    with pytest.raises(DatasetError, match="pixels"):
        decode_image(png_header(side, side), "bomb.png")


def test_damaged_odd_and_deep_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    with pytest.raises(DatasetError, match=r"Cannot decode image a\.png"):
        decode_image(png(np.random.default_rng(0).integers(256, size=(9, 9)))[:70], "a.png")
    with pytest.raises(DatasetError, match="Cannot decode"):
        decode_image(png(np.zeros((9, 9)), None, "BMP"), "a.png")
    stream = io.BytesIO()
    image_module.fromarray(np.full((2, 2), 300, np.uint16)).save(stream, "PNG")
    with pytest.raises(DatasetError, match="8 bits"):
        decode_image(stream.getvalue(), "deep.png")
    tree = {"train/a/0.png": png(np.zeros((2, 2))), "train/a/1.png": png(np.zeros((3, 2)))}
    write_tree(tmp_path / "cifar10", tree)
    with pytest.raises(DatasetError, match=r"1\.png has shape \(3, 2, 1\)"):
        datasets.cifar10(tmp_path)


def test_omniglot_with_a_drawing_missing(tmp_path):
    tree = omniglot_tree()
    tree.pop("images_background/Greek/character02/0004_10.png")
    write_tree(tmp_path / "omniglot", tree)
    with pytest.raises(DatasetError, match="'Greek', 'character02'"):
        datasets.omniglot(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"not a number 1:2\n", "not LIBSVM"),
        (b"1 24:1\n", "not LIBSVM"),  # more features than ijcnn1 has
        (b"1 0:1\n", "not LIBSVM"),  # indices start at 1
        (b"1 1:1\n3 1:1\n", "line 2 has 3"),
        (b"", "no lines|not LIBSVM"),
        (b"1 1:nan\n", r"nan at index \(0, 0\)"),
        (b"-1 1:1\n1 2:inf\n", r"inf at index \(1, 1\)"),
    ],
)
def test_libsvm_text_that_is_wrong(tmp_path, text, message):
    pytest.importorskip("sklearn")
    write_tree(tmp_path / "ijcnn1", {"ijcnn1.tr": text, "ijcnn1.val": b"1 1:1\n"})
    with pytest.raises(DatasetError, match=message):
        datasets.ijcnn1(tmp_path)


def test_ijcnn1_too_short_to_cut(tmp_path):
    pytest.importorskip("sklearn")
    write_tree(tmp_path / "ijcnn1", {"ijcnn1": b"1 1:1\n"})
    with pytest.raises(DatasetError, match="more than 35000 lines"):
        datasets.ijcnn1(tmp_path)
