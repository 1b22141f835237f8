"""Score a checkpoint against held-out data: FID, KID, precision, recall and MMD^2."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mmd.commands.models import load_either
from lightning_mmd.data import SampleDataModule
from lightning_mmd.feature_metrics import FeatureMetrics
from lightning_mmd.latents import as_inputs, select
from lightning_mmd.metrics import MaximumMeanDiscrepancy
from lightning_mmd.module import MMDGAN
from lightning_mmd.pixel_kernel import PixelKernel

__all__ = ["evaluate", "score", "score_classes"]

_ORDER = ("fid", "kid", "kid_std", "precision", "recall", "mmd2", "mmd2_error")


def evaluate(
    data: SampleDataModule,
    features: nn.Module,
    ckpt_path: Path | None = None,
    pretrained: str | None = None,
    num: int = 10_000,
    split: Literal["validation", "test"] = "test",
    output: Path | None = None,
    batch_size: int = 500,
    seed: int = 0,
    per_class: bool = False,
    trust: str | list[str] | None = None,
) -> dict[str, Any]:
    """Score samples of a checkpoint against held-out data; beside each score, that of real data.

    Args:
        data: The data module.
        features: Network that embeds images, for example ``ClassifierFeatures``,
            ``TorchvisionFeatures`` or ``InceptionFeatures``. It should be one that training has not
            seen.
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote; averaged weights are used where it
            has any.
        pretrained: In place of a checkpoint, saved weights, see ``lightning-mmd sample``.
        num: Samples and real images to compare, >= 4; the held-out images may be fewer.
        split: Which images to compare with. Choose between trainings on ``validation``, and report
            ``test`` once.
        output: A JSON file of everything that is printed.
        batch_size: Samples at a time, >= 1.
        seed: Of the latents and of KID's subsets.
        per_class: Whether to score each class alone too, by KID; and, where the features are a
            classifier's, how many samples it puts in the class that was asked for. The generator
            must take labels, and the data serve them (``--data.labels true``).
        trust: Modules of your own that the checkpoint's networks come from.

    Returns:
        Scores, floors, and what they were measured with.
    """
    if num < 4 or batch_size < 1:
        raise ValueError(
            f"--num must be at least 4 and --batch_size at least 1, got {num} and {batch_size}."
        )
    model = load_either(ckpt_path, pretrained, trust)
    data.prepare_data()
    data.setup("test")
    if per_class and not data.labels:
        raise ValueError("--per_class needs labels of the data. Add --data.labels true.")
    held_out = _take(data.test_dataloader() if split == "test" else data.val_dataloader(), num)
    # As many training images as samples: the floor has the same bias as the scores.
    training = _take(data.train_dataloader(), num)
    asked = _asked(model, len(training), seed) if per_class else torch.empty(0)
    samples = torch.cat(list(_samples(model, len(training), batch_size, seed)))
    if samples.shape[1:] != held_out.shape[1:]:
        raise ValueError(
            f"the model makes samples of shape {tuple(samples.shape[1:])}, but the data are "
            f"{tuple(held_out.shape[1:])}. Give --data what the model was trained on."
        )
    scores, floors = score(held_out, (samples, training), features, batch_size, seed)
    classes = {}
    if per_class:
        loaders = data.test_dataloader() if split == "test" else data.val_dataloader()
        known = _take(loaders, num, 1), _take(data.train_dataloader(), len(training), 1)
        sides = (held_out, known[0]), (samples, asked), (training, known[1])
        classes = score_classes(*sides, features, batch_size, seed)
    report = {
        "checkpoint": str(pretrained if ckpt_path is None else ckpt_path),
        "data": type(data).__name__,
        "split": split,
        "features": type(features).__name__,
        "num_real": len(held_out),
        "num_samples": len(samples),
        "seed": seed,
        "averaged": model.averaged_generator is not None,
        "scores": scores,
        "floors": floors,
        **classes,
    }
    print(table(report))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def score(
    real: Tensor, sides: Sequence[Tensor], features: nn.Module, batch_size: int, seed: int
) -> list[dict[str, float]]:
    """Return FID, KID, precision and recall in features, and MMD^2 of the images themselves.

    Args:
        real: Real samples (n, ...), embedded once.
        sides: Samples to judge, (m, ...) each.
        features: Network from samples to features.
        batch_size: Samples at a time.
        seed: Of KID's subsets.

    Returns:
        The scores of each side, by name.
    """
    embedded = FeatureMetrics(features, seed=seed, reset_real_samples=False)
    plain = MaximumMeanDiscrepancy(PixelKernel(), reset_real_samples=False, with_error=True)
    metrics = embedded, plain
    _update(metrics, real, batch_size, real=True)
    found = []
    for samples in sides:
        _update(metrics, samples, batch_size, real=False)
        values = {**embedded.compute(), **plain.compute()}
        found.append({name: float(values[name]) for name in _ORDER if name in values})
        for metric in metrics:
            metric.reset()
    return found


Labelled = tuple[Tensor, Tensor]


def score_classes(
    real: Labelled,
    fake: Labelled,
    others: Labelled,
    features: nn.Module,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Score each class alone.

    Args:
        real: Held-out samples (n, ...) and their classes (n,).
        fake: Generated samples and the classes that were asked for.
        others: Samples of the training data and their classes, for the floor.
        features: Network from samples to features; its method ``classify``, where it has one,
            tells the class of samples.
        batch_size: Samples at a time.
        seed: Of KID's subsets.

    Returns:
        ``classes``: of each class ``kid``, its ``floor`` and ``asked_for``, the share of its
        samples that the classifier puts in it. ``asked_for``: that of all samples.
    """
    classify = getattr(features, "classify", None)
    told = None
    if classify is not None:
        told = torch.cat([classify(part) for part in fake[0].split(batch_size)]) == fake[1]
    found: dict[int, dict[str, float]] = {}
    for label in real[1].unique().tolist():
        metric = FeatureMetrics(features, seed=seed, neighbours=None, reset_real_samples=False)
        parts = [samples[classes == label] for samples, classes in (real, fake, others)]
        if min(map(len, parts)) < 4:
            raise ValueError(
                f"class {label} has {len(parts[0])} held-out images, {len(parts[1])} samples and "
                f"{len(parts[2])} training images: at least 4 of each are needed. Raise --num."
            )
        _update([metric], parts[0], batch_size, real=True)
        values = []
        for part in parts[1:]:
            _update([metric], part, batch_size, real=False)
            values.append(float(metric.compute()["kid"]))
            metric.reset()
        found[label] = {"kid": values[0], "floor": values[1]}
        if told is not None:
            found[label]["asked_for"] = float(told[fake[1] == label].double().mean())
    total = {} if told is None else {"asked_for": float(told.double().mean())}
    return {"classes": found, **total}


def _update(metrics: Iterable[Metric], samples: Tensor, batch_size: int, real: bool) -> None:
    for part in samples.split(batch_size):
        for metric in metrics:
            metric.update(part, real=real)


def table(report: dict[str, Any]) -> str:
    """Lay a report out: a row a score."""
    averaged = " of averaged weights" if report["averaged"] else ""
    lines = [
        f"{report['num_samples']} samples{averaged} against {report['num_real']} {report['split']} "
        f"images; features: {report['features']}",
        f"{'':10}{'samples':>12}{'real images':>14}",
    ]
    for name, value in report["scores"].items():
        lines.append(f"{name:10}{value:12.4g}{report['floors'][name]:14.4g}")
    if "fid" not in report["scores"]:
        lines.append("no FID: it needs 2000 images on each side")
    if "classes" in report:
        lines.append(f"{'class':10}{'kid':>12}{'real images':>14}{'as asked':>11}")
    for label, row in report.get("classes", {}).items():
        share = f"{row['asked_for']:11.1%}" if "asked_for" in row else ""
        lines.append(f"{label!s:10}{row['kid']:12.4g}{row['floor']:14.4g}{share}")
    if "asked_for" in report:
        lines.append(f"{report['asked_for']:.1%} of the samples are of the class asked for")
    return "\n".join(lines)


def _take(batches: Iterable[Any], num: int, part: int = 0) -> Tensor:
    """Return the first samples of a loader, or with ``part`` 1 their labels."""
    parts: list[Tensor] = []
    for batch in batches:
        parts.append(batch[part] if isinstance(batch, (tuple, list)) else batch)
        if sum(map(len, parts)) >= num:
            break
    return torch.cat(parts)[:num]


def _asked(model: MMDGAN, num: int, seed: int) -> Tensor:
    latents = as_inputs(model.fixed_latents(num, seed))
    if len(latents) != 2:
        raise ValueError(
            "--per_class needs a generator that takes labels; this one takes latents alone. Train "
            "one: lightning-mmd fit --config mnist_conditional."
        )
    return latents[1].cpu()


def _samples(model: MMDGAN, num: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    latents = as_inputs(model.fixed_latents(num, seed))
    for start in range(0, num, batch_size):
        part = select(latents, slice(start, start + batch_size))
        yield model.sample(len(part[0]), latents=part)
