"""Small public data sets, label noise, splits and batches, of arrays or of a loader of yours.

    from gradhpo import datasets
    data = datasets.load("mnist")            # or datasets.mnist()
    train, val = datasets.split(data.train, (55_000, 5_000), seed=0)

Files are looked for in `data_dir`, in the folder named by the environment
variable GRADHPO_DATA, and in the download cache, in this order; what is in none
of them is downloaded, checked against its SHA-256. Importing opens no socket.
"""

from typing import TYPE_CHECKING, Any

from gradhpo.datasets.corruption import corrupt_labels
from gradhpo.datasets.dataset import Dataset, DatasetError, check_finite
from gradhpo.datasets.loaders import Endless, Masked, Position, from_loader
from gradhpo.datasets.registry import available, load, loader
from gradhpo.datasets.windows import batches, epoch_indices, sample_indices, split

if TYPE_CHECKING:
    from gradhpo.datasets.builtin import digits, gaussian_clusters
    from gradhpo.datasets.characters import omniglot
    from gradhpo.datasets.cifar import cifar10, cifar100
    from gradhpo.datasets.class_folders import image_folder
    from gradhpo.datasets.idx import fashion_mnist, mnist
    from gradhpo.datasets.sparse_text import a9a, ijcnn1

__all__ = [
    "Dataset",
    "DatasetError",
    "Endless",
    "Masked",
    "Position",
    "a9a",
    "available",
    "batches",
    "check_finite",
    "cifar10",
    "cifar100",
    "corrupt_labels",
    "digits",
    "epoch_indices",
    "fashion_mnist",
    "from_loader",
    "gaussian_clusters",
    "ijcnn1",
    "image_folder",
    "load",
    "mnist",
    "omniglot",
    "sample_indices",
    "split",
]


def __getattr__(name: str) -> Any:
    if name in available():  # a loader: its module is imported now
        return loader(name)
    if name == "image_folder":
        from gradhpo.datasets.class_folders import image_folder

        return image_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
