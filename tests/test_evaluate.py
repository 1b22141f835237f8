"""Networks that judge, the classifier's command, and scores of a checkpoint."""

import json
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from lightning_mmd import (
    MMDGAN,
    ClassifierFeatures,
    FeatureMetrics,
    ImageClassifier,
    InceptionFeatures,
    MaximumMeanDiscrepancy,
    PixelKernel,
    TorchvisionFeatures,
)
from lightning_mmd.cli import main
from lightning_mmd.data import DigitsDataModule

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.yaml")
DIGITS = ["--data", "DigitsDataModule"]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained classifier of digits, and a checkpoint of a short training."""
    torch.set_default_dtype(torch.float32)
    path = tmp_path_factory.mktemp("evaluate")
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    main(
        [
            *("classifier", *quiet, "--trainer.enable_checkpointing=false", *DIGITS),
            *(
                "--trainer.max_epochs=15",
                "--model.sample_shape=[1,8,8]",
                "--model.channels=[16,32]",
            ),
            *("--model.num_features=32", "--data.labels=true", "--seed_everything=0"),
            f"--output={path}/judge.ckpt",
        ]
    )
    saves = "--trainer.callbacks+=ModelCheckpoint"
    main(
        [
            *("fit", "--config", CONFIG, *quiet),
            *("--trainer.max_steps=20", "--trainer.limit_val_batches=0"),
            *('--trainer.callbacks=[{"class_path": "GeneratorEMA"}]', saves),
            f"--trainer.callbacks.dirpath={path}/saved",
            *("--trainer.callbacks.every_n_train_steps=20", f"--trainer.default_root_dir={path}"),
        ]
    )
    return path


def test_the_classifier_knows_digits(folder):
    classifier = ImageClassifier.load_from_checkpoint(folder / "judge.ckpt", weights_only=True)
    data = DigitsDataModule(labels=True)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        right = (classifier(images).argmax(1) == labels).float().mean()
    assert right > 0.9
    features = ClassifierFeatures(folder / "judge.ckpt")
    with torch.no_grad():
        logits = classifier.network.head(features(images))
        assert torch.equal(logits, classifier(images))


def test_scores_are_those_of_the_samples(folder, capsys):
    checkpoint = folder / "saved" / "last.ckpt"
    main(
        [
            *("evaluate", "--ckpt_path", str(checkpoint), *DIGITS, "--num=300"),
            *("--features", "ClassifierFeatures", f"--features.path={folder}/judge.ckpt"),
            *(f"--output={folder}/scores.json", "--split=validation", "--batch_size=100"),
        ]
    )
    printed = capsys.readouterr().out
    report = json.loads((folder / "scores.json").read_text())
    data = DigitsDataModule()
    data.setup()
    real = torch.cat(list(data.val_dataloader()))[:300]
    assert (report["num_real"], report["num_samples"]) == (len(real), 300)
    assert report["averaged"]

    model = MMDGAN.load_from_checkpoint(checkpoint, weights_only=True)
    fake = model.sample(300, model.fixed_latents(300, 0))
    metrics = FeatureMetrics(ClassifierFeatures(folder / "judge.ckpt"))
    plain = MaximumMeanDiscrepancy(PixelKernel(), with_error=True)
    for metric in (metrics, plain):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    expected = {**metrics.compute(), **plain.compute()}
    names = {"kid", "kid_std", "precision", "recall", "mmd2", "mmd2_error"}
    assert report["scores"].keys() == names
    for name, value in report["scores"].items():
        assert value == pytest.approx(float(expected[name]), rel=1e-4), name
    assert abs(report["floors"]["kid"]) < 0.05 * report["scores"]["kid"]  # real against real
    assert report["floors"]["precision"] > 0.5
    assert "no FID: it needs 2000 images on each side" in printed
    assert f"{report['scores']['kid']:.4g}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num=2"], "--num must be at least 4"),
        (["--ckpt_path=none.ckpt"], "no checkpoint at none.ckpt"),
        (["--features", "ClassifierFeatures", "--features.path=x"], "no classifier at x"),
        (["--split=train"], "split"),
    ],
)
def test_what_cannot_be_evaluated_is_named(arguments, message, folder, capsys):
    usual = ["--ckpt_path", str(folder / "saved" / "last.ckpt"), *DIGITS]
    usual += ["--features", "ClassifierFeatures", f"--features.path={folder}/judge.ckpt"]
    with pytest.raises(SystemExit):
        main(["evaluate", *usual, *arguments])
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_is_no_classifier_is_refused(folder):
    with pytest.raises(ValueError, match="is no checkpoint of an ImageClassifier"):
        ClassifierFeatures(folder / "saved" / "last.ckpt")


def test_images_of_another_shape_are_refused(folder):
    features = ClassifierFeatures(folder / "judge.ckpt")
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(1, 28, 28\)"):
        features(torch.zeros(2, 1, 28, 28))


def test_a_classifier_needs_labels():
    classifier = ImageClassifier([1, 8, 8])
    with pytest.raises(ValueError, match="Set `labels: true`"):
        classifier.training_step(torch.zeros(2, 1, 8, 8), 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_features_are_what_the_last_layer_gets(channels, tmp_path):
    torch.manual_seed(0)
    network = get_model("resnet18", weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    features = TorchvisionFeatures("resnet18", path=tmp_path / "weights.pt")
    images = 2 * torch.rand(2, channels, 40, 40) - 1
    seen = []
    network.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(features.prepare(((images + 1) / 2).expand(-1, 3, -1, -1)))
        assert torch.equal(features(images), seen[0])
    assert seen[0].shape == (2, 512)


def test_inception_gets_bytes(monkeypatch):
    import torchmetrics.image.fid as fid

    class Recorder(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.kwargs = kwargs

        def forward(self, images):
            return images.flatten(1)

    monkeypatch.setattr(fid, "NoTrainInceptionV3", Recorder)
    network = InceptionFeatures("weights.pt")
    assert network.network.kwargs["features_list"] == ["2048"]
    images = torch.tensor([-1.0, -1 + 2 / 255, 0.5, 1.0, 1.5]).reshape(1, 1, 1, 5)
    expected = torch.tensor([0, 1, 191, 255, 255], dtype=torch.uint8).repeat(3)[None]
    assert torch.equal(network(images), expected)
    with pytest.raises(ValueError, match=r"1 or 3, h, w"):
        network(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("network", [TorchvisionFeatures, InceptionFeatures])
def test_without_a_network_the_message_says_what_to_do(network, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ConnectionError, match=r"no route to host.*Give `path`"):
        network()
