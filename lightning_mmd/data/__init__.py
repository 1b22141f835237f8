r"""Data modules: images in [-1, 1] or points in the plane, in three splits, with or without labels.

Every module holds its samples in memory, images as bytes, and splits them into training,
validation and test samples. A batch is a tensor (n, \*sample_shape), or with `labels=True` a pair
of that tensor and the classes (n). Under a Trainer bytes become numbers, and images are mirrored,
on the device. Every order is a function of (seed, epoch, position) and every mirrored image one of
(seed, position), where the position counts the samples that all processes have trained on. Workers,
processes and batch sizes do not change the order, and a resumed training goes on with the sample
at which it stopped. Nothing reads or moves the global random state.
"""

from lightning_mmd.data.base import ImageDataModule, SampleDataModule
from lightning_mmd.data.dataset import TensorSamples, pixels_to_unit, split_indices
from lightning_mmd.data.digits import DigitsDataModule
from lightning_mmd.data.image_folder import ImageFolderDataModule
from lightning_mmd.data.mixture import GaussianMixtureDataModule
from lightning_mmd.data.order import BatchSizes, Order, coin_flips
from lightning_mmd.data.torchvision_sets import TorchvisionDataModule, import_torchvision

__all__ = [
    "BatchSizes",
    "DigitsDataModule",
    "GaussianMixtureDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "Order",
    "SampleDataModule",
    "TensorSamples",
    "TorchvisionDataModule",
    "coin_flips",
    "import_torchvision",
    "pixels_to_unit",
    "split_indices",
]
