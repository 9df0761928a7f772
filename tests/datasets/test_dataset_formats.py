"""Every official format, in every container, read back exactly."""

import numpy as np
import pytest
from dataset_files import (
    COMPRESS,
    IMAGES,
    LABELS,
    idx_files,
    omniglot_tree,
    png,
    records,
    write_tar,
    write_tree,
)

from gradhpo import GradhpoWarning, datasets


def assert_batch(batch, inputs, targets):
    assert batch.inputs.dtype == np.float32 and batch.targets.dtype == np.int32
    np.testing.assert_array_equal(batch.inputs, np.float32(inputs))
    np.testing.assert_array_equal(batch.targets, targets)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    "name, folder",
    [("mnist", "mnist"), ("fashion_mnist", "fashion-mnist"), ("fashion_mnist", "fashion_mnist")],
)
def test_idx_plain_and_compressed(tmp_path, name, folder, suffix):
    write_tree(tmp_path / folder, idx_files(suffix))
    if suffix == ".gz":  # the names of the official files, and not their contents
        with pytest.warns(GradhpoWarning, match="not the official file of that name") as told:
            data = datasets.load(name, tmp_path)
        assert len(told) == 4
    else:
        data = datasets.load(name, tmp_path)
    assert_batch(data.train, IMAGES[:3, ..., None] / np.float32(255), LABELS[:3])
    assert_batch(data.test, IMAGES[3:, ..., None] / np.float32(255), LABELS[3:])
    assert data.num_classes == 10
    assert sorted(data.files) == sorted(idx_files(suffix))
    assert all(len(digest) == 64 for digest in data.files.values())


def test_idx_in_any_container(tmp_path, write_container):
    write_container(tmp_path / "mnist", {f"raw/{k}": v for k, v in idx_files().items()})
    assert_batch(datasets.mnist(tmp_path).train, IMAGES[:3, ..., None] / np.float32(255), [3, 0, 9])


def test_idx_without_test_part(tmp_path):
    train = {k: v for k, v in idx_files().items() if k.startswith("train")}
    write_tree(tmp_path / "mnist", train)
    assert datasets.mnist(tmp_path).test is None


def test_cifar10_records_in_any_container(tmp_path, write_container):
    (one, x1), (two, x2), (test, x3) = (records(y, 1, i) for i, y in enumerate(([1, 9], [4], [0])))
    files = {"data_batch_1.bin": one, "data_batch_2.bin": two, "test_batch.bin": test}
    files["batches.meta.txt"] = b"airplane\nautomobile\n\n"
    files["readme.html"] = b"<html></html>"
    tree = {f"cifar-10-batches-bin/{k}": v for k, v in files.items() if k != "readme.html"}
    write_container(tmp_path / "cifar10", tree)
    data = datasets.cifar10(tmp_path)
    assert_batch(data.train, np.concatenate([x1, x2]) / np.float32(255), [1, 9, 4])
    assert_batch(data.test, x3 / np.float32(255), [0])
    assert data.num_classes == 10 and data.class_names == ("airplane", "automobile")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cifar100_records_use_the_fine_label(tmp_path, suffix):
    data, images = records([99, 0, 7], 2)
    write_tree(tmp_path / "cifar100", {f"train_subset.bin{suffix}": COMPRESS[suffix](data)})
    loaded = datasets.cifar100(tmp_path)
    assert_batch(loaded.train, images / np.float32(255), [99, 0, 7])
    assert loaded.test is None and loaded.num_classes == 100


def test_zero_bytes_are_records_not_an_empty_tar(tmp_path):
    """512 zero bytes end a tar archive, and begin a dark picture of class 0."""
    write_tree(tmp_path / "cifar10", {"data_batch_1.bin": bytes(2 * 3073)})
    assert datasets.cifar10(tmp_path).train.inputs.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("JPEG", "jpg")])
def test_class_folders_in_any_container(tmp_path, write_container, kind, suffix):
    pixels = np.full((4, 32, 32, 3), 51)
    names = ["train/cat/0", "train/ape/0", "train/cat/1", "test/cat/0"]
    tree = {f"c/{n}.{suffix}": png(x, None, kind) for n, x in zip(names, pixels, strict=True)}
    write_container(tmp_path / "cifar10", tree)
    data = datasets.cifar10(tmp_path)
    assert data.class_names == ("ape", "cat") and data.num_classes == 2
    assert_batch(data.train, pixels[:3] / np.float32(255), [0, 1, 1])
    assert_batch(data.test, pixels[:1] / np.float32(255), [1])


def test_class_folders_without_split_in_numerical_order(tmp_path):
    tree = {f"{c}/a.png": png(np.full((2, 2), c)) for c in (10, 9, 0)}
    write_tree(tmp_path / "mnist", tree)
    data = datasets.mnist(tmp_path)
    assert data.class_names == ("0", "9", "10") and data.test is None
    assert data.train.inputs.shape == (3, 2, 2, 1)
    np.testing.assert_array_equal(data.train.inputs[:, 0, 0, 0] * 255, [0, 10, 9])  # by path
    np.testing.assert_array_equal(data.train.targets, [0, 2, 1])
    assert data.files.keys() == tree.keys()


def test_omniglot_in_any_container(tmp_path, write_container):
    tree = omniglot_tree() | omniglot_tree("images_evaluation", ("Tibetan",), 4)
    write_container(tmp_path / "omniglot", tree)
    data = datasets.omniglot(tmp_path, size=None)
    assert data.class_names == ("Greek", "Latin", "Tibetan") and data.num_classes == 3
    assert data.train.inputs.shape == (4, 3, 105, 105) and data.train.inputs.dtype == np.float32
    np.testing.assert_array_equal(data.train.targets, [0, 0, 1, 1])
    np.testing.assert_array_equal(data.test.targets, [2, 2])
    assert set(np.unique(data.train.inputs)) == {0.0, 1.0}
    columns = (data.train.inputs[:, :, 0] == 0).sum(-1)  # Latin was numbered first: 1 and 2
    np.testing.assert_array_equal(columns, 10 * np.array([[3], [4], [1], [2]]) + [1, 2, 10])


def test_omniglot_background_only_and_resized(tmp_path):
    write_tar(tmp_path / "omniglot" / "a.tar.xz", omniglot_tree(), "w:xz")
    data = datasets.omniglot(tmp_path)
    assert data.train.inputs.shape == (4, 3, 28, 28) and data.test is None
    share = (data.train.inputs < 0.5).mean(axis=(2, 3))[0]
    np.testing.assert_allclose(share, np.array([31, 32, 40]) / 105, atol=1 / 28)


TEXT = b"-1 1:0.5 22:-2\n1 3:1e-3 \n+1 2:4\n"
DENSE = np.zeros((3, 22), np.float32)
DENSE[0, 0], DENSE[0, 21], DENSE[1, 2], DENSE[2, 1] = 0.5, -2, 1e-3, 4


@pytest.mark.parametrize("suffix", COMPRESS)
def test_libsvm_plain_and_compressed(tmp_path, suffix):
    pytest.importorskip("sklearn")
    names = ("ijcnn1.tr", "ijcnn1.val", "ijcnn1.t")
    write_tree(tmp_path / "ijcnn1", {n + suffix: COMPRESS[suffix](TEXT) for n in names})
    data = datasets.ijcnn1(tmp_path)
    for batch in (data.train, data.validation, data.test):
        assert_batch(batch, DENSE, [0, 1, 1])
    assert data.num_classes == 2


def test_ijcnn1_is_cut_where_the_official_parts_meet(tmp_path):
    pytest.importorskip("sklearn")
    write_tree(tmp_path / "ijcnn1", {"ijcnn1": b"-1 1:1\n" * 35_000 + TEXT})
    data = datasets.ijcnn1(tmp_path)
    assert data.train.inputs.shape == (35_000, 22) and data.train.targets.sum() == 0
    assert_batch(data.validation, DENSE, [0, 1, 1])
    assert data.test is None


@pytest.mark.filterwarnings("ignore:.*is not the official file:gradhpo.GradhpoWarning")
def test_a9a_has_123_features_even_if_the_last_is_absent(tmp_path, write_container):
    pytest.importorskip("sklearn")
    write_container(tmp_path / "a9a", {"a9a": TEXT, "a9a.t": b"+1 5:1\n"})
    data = datasets.a9a(tmp_path)
    assert data.train.inputs.shape == (3, 123) and data.test.inputs.shape == (1, 123)
    assert data.test.inputs[0, 4] == 1


def test_image_folder_in_the_layout_of_tiny_imagenet(tmp_path):
    grey, colour = np.full((4, 4), 7), np.arange(48).reshape(4, 4, 3)
    tree = {"train/n2/images/n2_0.JPEG": png(grey, None, "JPEG"), "train/n1/a.png": png(colour)}
    write_tree(tmp_path, {**tree, "train/n1/boxes.txt": b"", "val/n3/a.png": png(colour)})
    data = datasets.image_folder(tmp_path)
    assert data.class_names == ("n1", "n2") and data.num_classes == 2 and data.test is None
    assert data.train.inputs.dtype == np.uint8 and data.train.targets.tolist() == [0, 1]
    np.testing.assert_array_equal(data.train.inputs[0], colour)
    np.testing.assert_array_equal(data.train.inputs[1], np.full((4, 4, 3), 7))
    assert datasets.image_folder(tmp_path, size=2).train.inputs.shape == (2, 2, 2, 3)
    write_tree(tmp_path, {"train/n1/b.png": png(grey[:3])})
    with pytest.raises(datasets.DatasetError, match=r"b\.png has shape \(3, 4, 3\).*size="):
        datasets.image_folder(tmp_path)
    with pytest.raises(datasets.DatasetError, match="is no folder"):
        datasets.image_folder(tmp_path / "absent")
    with pytest.raises(datasets.DatasetError, match="holds no images"):
        datasets.image_folder(tmp_path / "val" / "n3")
