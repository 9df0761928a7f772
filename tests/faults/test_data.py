"""Faults 27 to 35: what a disk, a network or the user's own arrays can do to the data."""

import gzip
import hashlib
import http.server
import re
import socket
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    GradhpoWarning,
    InOrder,
    Pool,
    Resident,
    Task,
    datasets,
    from_optax,
    one_step,
    tune,
)
from gradhpo.datasets import DatasetError, idx
from gradhpo.datasets.download import Remote, download

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 3)).astype(np.float32), RNG.normal(size=40).astype(np.float32)
SPOILT = X.copy()
SPOILT[17, 2] = np.nan


def loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM, METHOD = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge), one_step()
VAL = Resident((X, Y), 8)


def run(train, val=VAL, episodes=4):
    task = Task(PROBLEM, jnp.zeros(3), jnp.float32(-1.0), train, val)
    return tune(task, METHOD, episodes=episodes, T=5, lr_hyper=0.1)


@pytest.fixture
def serve():
    """`serve(body, length=None) -> url`: a server on this machine that promises `length` bytes."""
    bodies, servers = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, length = bodies[self.server]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    def start(body, length=None):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        bodies[server] = body, length
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/data.gz"

    pytest.importorskip("pooch")
    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("sockets are blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("GRADHPO_DATA", raising=False)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_27_an_interrupted_download_is_never_used_and_the_next_one_begins_anew(serve, tmp_path):
    body = RNG.bytes(5000)
    digest = sha256(body)
    with pytest.raises(DatasetError, match="Could not download"):
        download(Remote(serve(body[:3000], length=5000), digest), tmp_path)
    assert not list(tmp_path.iterdir())
    assert download(Remote(serve(body), digest), tmp_path).read_bytes() == body


def test_28_a_damaged_file_in_the_cache_is_set_aside_with_both_digests(tmp_path):
    good, bad = b"good", b"goad"
    (tmp_path / "data.gz").write_bytes(bad)
    with pytest.raises(DatasetError) as error:
        download(Remote("http://localhost/data.gz", sha256(good)), tmp_path)
    assert sha256(good) in str(error.value) and sha256(bad) in str(error.value)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("data.gz.corrupt", bad)
    ]


@pytest.mark.parametrize("byte", [0, -1], ids=["its head", "its end"])
def test_28_a_damaged_file_of_the_users_is_refused_and_left_where_it_is(
    tmp_path, monkeypatch, byte
):
    write_mnist(tmp_path, np.zeros((2, 1, 2)), np.array([1, 9]), ".gz")
    name = "train-labels-idx1-ubyte.gz"
    path = tmp_path / "mnist" / name
    digest, size = sha256(path.read_bytes()), path.stat().st_size
    monkeypatch.setattr(idx, "_MNIST", {name: (digest, size)})
    assert len(datasets.mnist(tmp_path).train.targets) == 2
    damaged = bytearray(path.read_bytes())
    damaged[byte] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DatasetError) as error:
        datasets.mnist(tmp_path)
    for part in (str(path), digest, sha256(damaged), "ownload it again"):
        assert part in str(error.value)
    assert path.read_bytes() == damaged


def test_28_a_list_of_digests_that_is_damaged_fits_nothing(tmp_path):
    write_mnist(tmp_path, np.zeros((2, 1, 2)), np.array([1, 9]))
    name = "train-labels-idx1-ubyte"
    digest = sha256((tmp_path / "mnist" / name).read_bytes()).encode()
    for bad in (b"\xe6" + digest[1:], digest[:-1]):
        (tmp_path / "SHA256SUMS").write_bytes(bad + b"  mnist/" + name.encode())
        with pytest.raises(DatasetError, match="SHA256SUMS lists"):
            datasets.mnist(tmp_path)


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"goo"], ids=["page", "short"])
def test_29_a_page_or_a_short_file_in_place_of_the_data_is_refused(serve, tmp_path, body):
    good = sha256(b"good")
    with pytest.raises(DatasetError) as error:
        download(Remote(serve(body), good), tmp_path)
    assert good in str(error.value) and sha256(body) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_30_without_a_network_the_message_has_url_digest_and_path(no_network, tmp_path):
    pytest.importorskip("pooch")
    remote = Remote("http://example.org/data.gz", sha256(b"good"))
    with pytest.raises(DatasetError) as error:
        download(remote, tmp_path)
    for part in (remote.url, remote.sha256, str(tmp_path / "data.gz"), "by hand"):
        assert part in str(error.value)
    (tmp_path / "data.gz").write_bytes(b"good")
    assert download(remote, tmp_path) == tmp_path / "data.gz"  # the copy that is there


@pytest.mark.parametrize(
    "make, index",
    [
        (lambda: Resident((SPOILT, Y), 8), "(17, 2)"),
        (lambda: Resident({"x": X, "y": SPOILT[:, 2]}), "(17,)"),
        (lambda: Pool((SPOILT, Y)), "(17, 2)"),
        (lambda: datasets.batches((SPOILT, Y), 8, seed=0), "(17, 2)"),
        (lambda: datasets.split((X, SPOILT[:, 2]), (20, 20), seed=0), "(17,)"),
    ],
)
def test_31_nan_in_a_data_set_is_refused_with_its_first_index(make, index):
    with pytest.raises(ValueError, match=re.escape(f"nan at index {index}")):
        make()


def parts(x):
    return [(x[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]


def cycle(x):
    made = iter(parts(x) * 4)
    return lambda: next(made)


def in_order(x):
    return InOrder((np.tile(x.reshape(5, 8, 3), (4, 1, 1)), np.tile(Y.reshape(5, 8), (4, 1))))


@pytest.mark.parametrize(
    "source", [cycle, in_order, lambda x: datasets.from_loader(parts(x))], ids=["f", "o", "l"]
)
@pytest.mark.parametrize("side", ["train", "val"])
def test_31_nan_in_a_batch_is_named_and_its_updates_are_undone(source, side):
    sides = {"train": VAL, "val": VAL} | {side: source(SPOILT)}
    with pytest.warns(GradhpoWarning, match="4 of the 20 updates") as told:
        state = run(**sides)
    (said,) = [str(each.message) for each in told]
    where = rf"nan at index \(1, 2\) of leaf \[0\], get_{side}_batch, batch 3 of episode 1"
    assert re.search(where, said), said
    assert np.isfinite(state.params).all() and np.isfinite(state.hyperparams)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resident((X[:0], Y[:0])),
        lambda: Resident((X, Y), 64),
        lambda: Pool(X[:0]),
        lambda: InOrder((X[:0], Y[:0])),
        lambda: InOrder((np.zeros((20, 0, 3)), np.zeros((20, 0)))),
        lambda: datasets.batches((X[:0], Y[:0]), 8, seed=0),
        lambda: datasets.batches((X, Y), 64, seed=0),
        lambda: datasets.split((X, Y), (40, 0), seed=0),
        lambda: datasets.split((X, Y), (40, 1), seed=0),
        lambda: datasets.epoch_indices(0, 40, 64),
        lambda: datasets.sample_indices(0, 0, 1, steps=3, replace=True),
    ],
)
def test_32_too_few_examples_are_an_error_at_construction(make):
    with pytest.raises(ValueError, match="empty|at least one|more than the 40|cannot be|positive"):
        make()


@pytest.mark.parametrize("source", [lambda: (X[:0], Y[:0]), datasets.from_loader([])])
def test_32_an_empty_batch_or_loader_is_an_error_before_the_first_step(source):
    with pytest.raises(ValueError, match="empty"):
        run(source)
    with pytest.raises(ValueError, match="empty"):
        run(VAL, source)


def idx_file(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder, images, labels, suffix=""):
    pack = gzip.compress if suffix else bytes
    (folder / "mnist").mkdir()
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / "mnist" / f"train-{kind}-ubyte{suffix}").write_bytes(pack(idx_file(array)))


def test_33_a_label_out_of_range_is_named_and_pixels_are_scaled(tmp_path):
    write_mnist(tmp_path, np.array([[[0, 255]], [[51, 0]]]), np.array([1, 9]))
    inputs = datasets.mnist(tmp_path).train.inputs
    assert inputs.dtype == np.float32 and inputs.max() == 1
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx_file(np.array([1, 10])))
    with pytest.raises(DatasetError, match=r"\[0, 10\), but train has 10 at index 1"):
        datasets.mnist(tmp_path)


def test_33_a_wrong_number_of_features_shows_every_leaf_and_its_shape():
    with pytest.raises(TypeError) as error:
        run(Resident((X[:, :2], Y), 8))
    notes = "\n".join(error.value.__notes__)
    assert "batch leaves [0]: (8, 2), [1]: (8,); params leaves" in notes and ": (3,)" in notes


def test_34_examples_in_two_parts_of_a_split_are_counted():
    inputs, targets = np.concatenate([X, X[:4]]), np.concatenate([Y, Y[:4]])
    with pytest.warns(UserWarning, match=r"rows of part 1 .* the parts overlap"):
        datasets.split((inputs, targets), (22, 22), seed=0)
    datasets.split((X, Y), (20, 20), seed=0)  # warnings are errors here


@pytest.mark.parametrize("pad", [False, True], ids=["left out", "filled up"])
def test_35_a_last_partial_batch_compiles_nothing(pad, compilations):
    def masked(w, lam, batch):
        (x, y), mask = batch if pad else (batch, None)
        return jnp.mean((x @ w - y) ** 2, where=mask)

    problem = BilevelProblem(from_optax(masked, lambda lam: optax.sgd(jnp.exp(lam))), masked)
    uneven = datasets.batches((X, Y), 16, seed=0, pad=pad)  # 16, 16 and 8
    loader = datasets.from_loader(
        [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])], pad=pad
    )
    task = Task(problem, jnp.zeros(3), jnp.float32(-3.0), uneven, loader)
    state = tune(task, METHOD, episodes=1, T=3, lr_hyper=0.1)
    before = compilations()
    tune(task, METHOD, episodes=3, T=3, lr_hyper=0.1, state=state)
    assert compilations() == before and uneven.position.epoch >= 3
