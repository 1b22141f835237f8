"""Streaming MMD^2 against scikit-learn, GeomLoss, torchmetrics' KID arithmetic and torch.cdist.

    python benchmarks/mmd_estimators.py

One thread, float32, a Gaussian kernel of bandwidth sqrt(d); KID has its cubic kernel. The error is
against float64. GeomLoss is measured where it is installed; its loss is half the biased MMD^2.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from meters import interleaved_seconds, peak_memory, peak_numpy_memory, ratio
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from lightning_mmd import Gaussian, Polynomial, mmd2_unbiased

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

Estimator = Callable[[Tensor, Tensor], float]


def by_scikit_learn(x: Tensor, y: Tensor, *, biased: bool = False) -> float:
    """Three calls of rbf_kernel, in the samples' precision."""
    a, b = x.numpy(), y.numpy()
    kernel = partial(rbf_kernel, gamma=1 / (2 * a.shape[1]))
    return _from_sums(
        *(float(kernel(p, q).sum(dtype="f8")) for p, q in _pairs(a, b)), len(a), biased
    )


def by_cdist(x: Tensor, y: Tensor) -> float:
    """Three calls of torch.cdist."""
    scale = -1 / (2 * x.shape[1])
    sums = (
        float((torch.cdist(p, q).square() * scale).exp().sum(dtype=torch.float64))
        for p, q in _pairs(x, y)
    )
    return _from_sums(*sums, len(x))


def by_geomloss(x: Tensor, y: Tensor) -> float:
    """Its Gaussian kernel loss, doubled."""
    loss = importlib.import_module("geomloss").SamplesLoss
    return 2 * float(loss("gaussian", blur=x.shape[1] ** 0.5, backend="tensorized")(x, y))


def in_float64(x: Tensor, y: Tensor, *, kind: str = "gaussian") -> float:
    """Scikit-learn in float64, a thousand rows at a time."""
    a, b = x.double().numpy(), y.double().numpy()
    if kind == "cubic":
        kernel, diagonal = partial(polynomial_kernel, degree=3), None
    else:
        kernel, diagonal = partial(rbf_kernel, gamma=1 / (2 * a.shape[1])), 1.0
    sums = [
        sum(float(kernel(p[i : i + 1000], q).sum()) for i in range(0, len(p), 1000))
        for p, q in _pairs(a, b)
    ]
    if diagonal is None:  # a constant is what _from_sums takes off: take the difference off here
        for k, p in ((0, a), (1, b)):
            sums[k] -= float((((p * p).sum(1) / p.shape[1] + 1) ** 3).sum()) - len(p)
    return _from_sums(*sums, len(a), kind == "biased")


def _pairs(x: Any, y: Any) -> tuple[tuple[Any, Any], ...]:
    return (x, x), (y, y), (x, y)


def _from_sums(xx: float, yy: float, xy: float, n: int, biased: bool = False) -> float:
    if biased:
        return (xx + yy - 2 * xy) / n**2
    return (xx + yy - 2 * n) / (n * (n - 1)) - 2 * xy / n**2


def compare(n: int, d: int, repeats: int) -> list[dict[str, Any]]:
    """Time, memory and error of all estimators on one pair of samples."""
    torch.manual_seed(0)
    x, y = torch.randn(n, d), torch.randn(n, d) + 0.5
    estimators: dict[str, tuple[Estimator, str]] = {
        "mmd2_unbiased": (lambda x, y: float(mmd2_unbiased(x, y, Gaussian(d**0.5))), "gaussian"),
        "scikit-learn": (by_scikit_learn, "gaussian"),
        "torch.cdist": (by_cdist, "gaussian"),
        "GeomLoss": (by_geomloss, "biased"),
        "mmd2_unbiased, cubic": (lambda x, y: float(mmd2_unbiased(x, y, Polynomial())), "cubic"),
        "torchmetrics KID, cubic": (lambda x, y: float(poly_mmd(x, y)), "cubic"),
    }
    if importlib.util.find_spec("geomloss") is None:
        print("GeomLoss is left out: it is not installed (pip install geomloss)")
        del estimators["GeomLoss"]
    exact = {kind: in_float64(x, y, kind=kind) for kind in {k for _, k in estimators.values()}}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(estimate, x, y) for name, (estimate, _) in estimators.items()
    }

    def products() -> None:  # no larger than a block, so that the memory costs no time
        for p, q in _pairs(x, y):
            for a in p.split(2048):
                for b in q.split(2048):
                    a @ b.T

    with torch.no_grad():
        seconds = interleaved_seconds({**calls, "products": products}, repeats)
        rows = []
        for name, call in calls.items():
            ours = "mmd2_unbiased" + ", cubic" * name.endswith("cubic")
            memory = peak_numpy_memory if name == "scikit-learn" else peak_memory
            kind = estimators[name][1]
            rows.append(
                {"n": n, "d": d, "estimator": name, "seconds": median(seconds[name])}
                | ratio(seconds[name], seconds[ours], "of_ours")
                | {
                    "product_speed": median(seconds["products"]) / median(seconds[name]),
                    "peak_MiB": memory(call) / 2**20,
                    "error": abs(call() / exact[kind] - 1),
                }
            )
    return rows


def main(
    sizes: list[tuple[int, int, int]] | None = None,
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Compare the estimators, print and save the table.

    Args:
        sizes: Number of points, dimension and turns of the timing of each comparison. Default:
            1000 points in 16, 256 and 2048 dimensions, 10000 in 256.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    sizes = sizes or [(1000, 16, 9), (1000, 256, 9), (1000, 2048, 5), (10000, 256, 2)]
    rows = [row for n, d, repeats in sizes for row in compare(n, d, repeats)]
    save_table(rows, directory / "mmd_estimators.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
