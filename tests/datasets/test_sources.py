"""Where files come from: folder, environment, download; and what goes wrong there."""

import hashlib
import http.server
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from dataset_files import idx_files, write_tree

from gradhpo import datasets
from gradhpo.datasets import DatasetError, idx
from gradhpo.datasets.download import Remote, download, require


@pytest.fixture
def server(tmp_path):
    """`(url, folder)` of a web server on this machine that serves a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, format, *args):
            pass

    folder = tmp_path / "www"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/", folder
        httpd.shutdown()
        thread.join()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("sockets are blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_order_of_the_places(tmp_path, monkeypatch, no_network):
    pytest.importorskip("pooch")
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    write_tree(mine / "mnist", idx_files())
    write_tree(theirs / "mnist", {k: v for k, v in idx_files().items() if k[:5] == "train"})
    monkeypatch.setenv("GRADHPO_DATA", str(theirs))
    assert datasets.mnist().test is None
    assert datasets.mnist(mine).test is not None
    with pytest.raises(DatasetError, match="Could not download"):  # not there: the cache is next
        datasets.fashion_mnist()
    with pytest.raises(DatasetError, match="No folder fashion_mnist or fashion-mnist in data_dir"):
        datasets.fashion_mnist(mine)  # asked for by name: nothing is downloaded


@pytest.mark.parametrize("given", ["GRADHPO_DATA", "data_dir"])
def test_a_data_folder_that_is_none_is_named(tmp_path, monkeypatch, no_network, given):
    """It was passed over, and the download cache taken instead."""
    (tmp_path / "file").write_text("no folder")
    for folder, problem in (("misspelt", "does not exist"), ("file", "is not a folder")):
        named = str(tmp_path / folder)
        monkeypatch.setenv("GRADHPO_DATA", named if given == "GRADHPO_DATA" else str(tmp_path))
        with pytest.raises(DatasetError, match=problem) as error:
            datasets.mnist(named if given == "data_dir" else None)
        assert f"{given}={named!r}" in str(error.value) and "holds mnist/" in str(error.value)
    write_tree(tmp_path / "mine" / "mnist", idx_files())
    monkeypatch.setenv("GRADHPO_DATA", str(tmp_path / "misspelt"))
    assert len(datasets.mnist(tmp_path / "mine").train.targets) == 3  # data_dir goes before it


def test_folder_with_nothing_of_the_set(tmp_path):
    write_tree(tmp_path / "cifar10", {"cifar-10-python.pkl": b"never read"})
    with pytest.raises(DatasetError, match=r"holds nothing .* cifar-10-binary\.tar\.gz"):
        datasets.cifar10(tmp_path)


def test_download_then_cache(server, monkeypatch, tmp_path):
    pytest.importorskip("pooch")
    url, folder = server
    files = idx_files(".gz")
    write_tree(folder, files)
    monkeypatch.setattr(idx, "_MNIST_URL", url)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    known = {name: (digests[name], len(data)) for name, data in files.items()}
    monkeypatch.setattr(idx, "_MNIST", known)
    first = datasets.mnist()
    assert first.files == digests
    (folder / "train-images-idx3-ubyte.gz").unlink()  # the server is not asked again
    np.testing.assert_array_equal(datasets.mnist().train.inputs, first.train.inputs)

    cached = next((tmp_path / "cache").rglob("train-images-idx3-ubyte.gz"))
    (cached.parent / "tmp1234").write_bytes(b"left by an interrupted download")
    assert datasets.mnist().files == digests
    damaged = bytearray(cached.read_bytes())
    damaged[20] ^= 1
    cached.write_bytes(damaged)
    with pytest.raises(DatasetError) as error:
        datasets.mnist()
    assert hashlib.sha256(damaged).hexdigest() in str(error.value)
    assert digests[cached.name] in str(error.value)
    assert not cached.exists() and cached.with_name(cached.name + ".corrupt").exists()
    write_tree(folder, files)
    assert datasets.mnist().files == digests


@pytest.mark.parametrize("served", [b"<html>Please log in</html>", b"goo"], ids=["html", "short"])
def test_download_of_the_wrong_digest(server, tmp_path, served):
    pytest.importorskip("pooch")
    url, folder = server
    write_tree(folder, {"data.gz": served})
    good = hashlib.sha256(b"good").hexdigest()
    with pytest.raises(DatasetError) as error:
        download(Remote(url + "data.gz", good), tmp_path / "target")
    for part in (good, hashlib.sha256(served).hexdigest(), url, str(tmp_path / "target")):
        assert part in str(error.value)
    assert not list((tmp_path / "target").iterdir())


def test_missing_on_the_server(server, tmp_path):
    pytest.importorskip("pooch")
    with pytest.raises(DatasetError, match="404"):
        download(Remote(server[0] + "absent.gz", "0" * 64), tmp_path / "target")


def test_no_network(no_network, tmp_path):
    pytest.importorskip("pooch")
    with pytest.raises(DatasetError) as error:
        datasets.omniglot()
    target = tmp_path / "cache" / "gradhpo" / "omniglot" / "images_background.zip"
    digest = "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"
    url = "https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip"
    for part in (str(target), digest, url, "GRADHPO_DATA"):
        assert part in str(error.value)


def test_nothing_is_downloaded_without_a_digest(no_network):
    pytest.importorskip("pooch")
    with pytest.raises(DatasetError, match=r"ijcnn1\.bz2 is not downloaded.*<data_dir>/ijcnn1/"):
        datasets.ijcnn1()


def test_missing_library_names_the_line_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[data\]"'):
        datasets.digits()
    with pytest.raises(ImportError, match="needs no_such_library"):
        require("no_such_library.part")


def test_names(tmp_path):
    names = datasets.available()
    assert set(names) <= set(datasets.__all__)
    for name in datasets.__all__:
        assert getattr(datasets, name) is not None
    with pytest.raises(ValueError, match="Did you mean 'mnist'"):
        datasets.load("mnits")
    with pytest.raises(AttributeError):
        _ = datasets.no_such_set
    with pytest.raises(TypeError):
        datasets.load("mnist", tmp_path, flavour="vanilla")


def test_importing_needs_no_optional_library_and_no_socket():
    code = """
import sys
def refuse(event, arguments):
    if event.startswith("socket."):
        raise AssertionError(event)
sys.addaudithook(refuse)
from gradhpo import datasets
datasets.load("gaussian_clusters")
loaded = {"sklearn", "pooch", "PIL", "requests", "gradhpo.datasets.cifar"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits():
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    assert data.train.inputs.shape == (1797, 8, 8, 1) and data.train.inputs.max() == 1
    assert np.bincount(data.train.targets).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip


def test_gaussian_clusters():
    data = datasets.gaussian_clusters(num_train=4000, num_test=500, separation=8.0)
    same = datasets.gaussian_clusters(num_train=400, num_test=500, separation=8.0)
    np.testing.assert_array_equal(data.test.inputs, same.test.inputs)
    centres = np.stack([data.train.inputs[data.train.targets == c].mean(0) for c in range(4)])
    distances = ((data.test.inputs[:, None] - centres) ** 2).sum(-1)
    assert (distances.argmin(1) == data.test.targets).mean() > 0.99
    residual = data.train.inputs - centres[data.train.targets]
    np.testing.assert_allclose(residual.std(0), 1, atol=0.05)
    with pytest.raises(ValueError, match="positive"):
        datasets.gaussian_clusters(num_train=0)
