"""The real files, where the environment variable GRADHPO_DATA names their folder."""

import os

import numpy as np
import pytest

from gradhpo import datasets

pytestmark = pytest.mark.skipif(not os.environ.get("GRADHPO_DATA"), reason="needs GRADHPO_DATA")

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def counts(batch):
    return np.bincount(batch.targets).tolist()


def load(name, **options):
    try:
        return datasets.load(name, os.environ["GRADHPO_DATA"], **options)
    except datasets.DatasetError as error:
        if "No folder" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize(
    "name, train, test, mean",
    [
        ("mnist", MNIST_TRAIN, MNIST_TEST, 0.13066),
        ("fashion_mnist", [6000] * 10, [1000] * 10, 0.28604),
    ],
)
def test_idx(name, train, test, mean):
    data = load(name)
    assert counts(data.train) == train and counts(data.test) == test
    assert data.train.inputs.shape[1:] == (28, 28, 1) and len(data.files) == 4
    assert data.train.inputs.mean(dtype=float) == pytest.approx(mean, abs=5e-6)


def test_cifar10():
    data = load("cifar10")
    assert len(set(counts(data.train))) == 1 and data.num_classes == 10  # balanced, also in part
    assert data.train.inputs.shape[1:] == (32, 32, 3)
    if any("jpeg_subset" in name for name in data.files):
        assert counts(data.train) == [1000] * 10 and counts(data.test) == [200] * 10
        assert data.class_names[:3] == ("airplane", "automobile", "bird")
        mean, deviation = (f(data.train.inputs, (0, 1, 2), float) for f in (np.mean, np.std))
        np.testing.assert_allclose(mean, [0.4934, 0.4831, 0.4470], atol=6e-5)
        np.testing.assert_allclose(deviation, [0.2460, 0.2441, 0.2616], atol=6e-5)


def test_cifar100():
    data = load("cifar100")
    assert data.train.inputs.shape[1:] == (32, 32, 3) and data.num_classes == 100
    assert len(set(counts(data.train))) == 1 and len(counts(data.train)) == 100
    assert data.class_names[0] == "apple" and data.class_names[99] == "worm"


def test_omniglot():
    data = load("omniglot")
    assert data.train.inputs.shape == (964, 20, 28, 28)
    assert data.test.inputs.shape == (659, 20, 28, 28)
    assert len(np.unique(data.train.targets)) == 30 and len(np.unique(data.test.targets)) == 20
    assert data.class_names[8] == "Braille" and data.num_classes == 50
    braille = data.train.inputs[data.train.targets == 8]
    assert any((c[2] == c[18]).all() for c in braille)  # the one known duplicate: drawers 3 and 19


def test_ijcnn1():
    data = load("ijcnn1")
    assert counts(data.train) == [31_585, 3_415] and counts(data.validation) == [13_552, 1_438]
    assert counts(data.test) == [82_989, 8_712] and data.train.inputs.shape[1] == 22


def test_a9a():
    data = load("a9a")
    assert counts(data.train) == [24_720, 7_841] and counts(data.test) == [12_435, 3_846]
    assert data.test.inputs.shape == (16_281, 123) and not data.test.inputs[:, 122].any()
    assert set(np.unique(data.train.inputs)) == {0.0, 1.0}
