"""Networks whose features judge samples: Inception, torchvision's, a small classifier's."""

from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmd.classifier import ImageClassifier
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.networks import ConvClassifier
from lightning_mmd.passes import seeded

__all__ = ["ClassifierFeatures", "DigitsFeatures", "InceptionFeatures", "TorchvisionFeatures"]

_BUILDS_CLASSIFIER = ("sample_shape", "num_classes", "num_features", "channels")


def _in_colour(images: Tensor) -> Tensor:
    """Return images (n, 3, h, w) in [0, 1] from images of 1 or 3 channels in [-1, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "these features are of images (n, 1 or 3, h, w) in [-1, 1], got shape "
            f"{tuple(images.shape)}."
        )
    return ((images.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)


class ClassifierFeatures(nn.Module):
    """Features of a classifier that ``lightning-mmd classifier`` trained: its last hidden layer.

    Args:
        path: Checkpoint of an `ImageClassifier`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of an `ImageClassifier`; on evaluation, if images are of
            another shape than those that it was trained on.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no classifier at {path}. Train one: lightning-mmd classifier "
                "--config configs/features_mnist.yaml"
            )
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            built = {name: checkpoint["hyper_parameters"][name] for name in _BUILDS_CLASSIFIER}
            classifier = ImageClassifier(**built)
            classifier.load_state_dict(checkpoint["state_dict"])
        except (KeyError, RuntimeError, TypeError, UnpicklingError) as error:
            raise ValueError(
                f"{path} is no checkpoint of an ImageClassifier. Train one: lightning-mmd "
                "classifier --config configs/features_mnist.yaml"
            ) from error
        self.sample_shape = tuple(built["sample_shape"])
        self.classifier = classifier.network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, c, h, w) in [-1, 1] to features (n, d)."""
        self._check(images)
        return self.classifier.features(images)

    def classify(self, images: Tensor) -> Tensor:
        """Map images (n, c, h, w) in [-1, 1] to their most likely classes (n,)."""
        self._check(images)
        return self.classifier(images).argmax(1)

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != self.sample_shape:
            raise ValueError(
                f"this classifier was trained on images of shape {self.sample_shape}, got "
                f"{tuple(images.shape[1:])}. Train one on this data."
            )


class TorchvisionFeatures(nn.Module):
    """Features of a torchvision network, after its own preparation of images.

    Args:
        name: Name of the network, for example ``efficientnet_b0``; see
            ``torchvision.models.list_models()``.
        weights: Name of its weights; they are downloaded once.
        layer: Node of its graph whose output is taken; ``flatten`` is what the classifying layer
            of most networks gets.
        path: File of weights to read in place of a download.

    Raises:
        ValueError: If there is no such network, weights or layer.
        ConnectionError: If the weights can be neither found nor downloaded.
    """

    def __init__(
        self,
        name: str = "efficientnet_b0",
        weights: str = "DEFAULT",
        layer: str = "flatten",
        path: str | Path | None = None,
    ) -> None:
        super().__init__()
        from torchvision.models import get_model, get_model_weights
        from torchvision.models.feature_extraction import create_feature_extractor

        chosen = get_model_weights(name)[weights]  # names what there is
        try:
            network = get_model(name, weights=None if path else chosen)
        except URLError as error:
            raise ConnectionError(_no_download(name, error)) from error
        if path:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval().requires_grad_(False)
        self.prepare = chosen.transforms(antialias=True)
        self.network = create_feature_extractor(network, {layer: "features"})

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 1 or 3, h, w) in [-1, 1] to features (n, d)."""
        return self.network(self.prepare(_in_colour(images)))["features"].flatten(1)


class InceptionFeatures(nn.Module):
    """The 2048 features of FID's Inception network, as torchmetrics and torch-fidelity have it.

    Args:
        path: File of its weights, in place of a download.

    Raises:
        ConnectionError: If the weights can be neither found nor downloaded.

    Source:
        Heusel et al. 2017, arXiv 1706.08500.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=["2048"],
                feature_extractor_weights_path=None if path is None else str(path),
            )
        except URLError as error:
            raise ConnectionError(_no_download("Inception", error)) from error

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 1 or 3, h, w) in [-1, 1] to features (n, 2048)."""
        return self.network((_in_colour(images) * 255).round().to(torch.uint8))


def _no_download(name: str, error: URLError) -> str:
    return (
        f"the weights of {name} could not be downloaded ({error.reason}). Give `path`, a file of "
        "them, or judge by a classifier: lightning-mmd classifier --config "
        "configs/features_mnist.yaml"
    )


class DigitsFeatures(nn.Module):
    """Features of a classifier of scikit-learn's digits, trained in the seconds that this takes.

    It is trained on the training split of `DigitsDataModule` alone, from seed 0, and is about 97 %
    right on the test split. Nothing is downloaded or kept.
    """

    sample_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        data = DigitsDataModule(batch_size=64, labels=True)
        data.setup()
        with seeded(torch.device("cpu"), 0), torch.enable_grad():
            classifier = ConvClassifier(self.sample_shape, 10, 64, (16, 32)).float()
            optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
            for epoch in range(20):
                loader = data.train_dataloader()
                loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
                for images, labels in loader:
                    loss = F.cross_entropy(classifier(images), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map digits (n, 1, 8, 8) in [-1, 1] to features (n, 64)."""
        return self.classifier.features(images.float())

    def classify(self, images: Tensor) -> Tensor:
        """Map digits (n, 1, 8, 8) in [-1, 1] to their most likely classes (n,)."""
        return self.classifier(images.float()).argmax(1)
