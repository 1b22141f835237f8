"""Does the generator draw the digit that it is asked for, and what do labels cost in quality?

    OMP_NUM_THREADS=1 python benchmarks/conditional.py DATA --updates 2000

The recipe of `configs/mnist_conditional.yaml` beside that of `configs/mnist.yaml`, in a plain loop,
at equal updates, three seeds. The judge (`judge.py`) scores 10,000 samples of the averaged
generator against the test images, and classifies them: `asked` is the share in the class that was
asked for, `rarest` that of the worst class. `learned` and `fixed` are `ClassFeatures`, `product`
is `ClassProductFeatures`; with `_apart` the generator's classes are drawn, not those of the batch.
Each run is a row of `results/conditional.csv`; runs
that are there are skipped.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from csv_rows import append_row, read_rows
from judge import Images, Judge, load, new_judge, to_unit
from race import CACHE, keep_memory
from torch import Tensor, nn
from torchvision.utils import save_image

from lightning_mmd import (
    ClassFeatures,
    ClassProductFeatures,
    Game,
    LabelledLatents,
    Latents,
    LearnedKernelCritic,
    Player,
    standard_rule,
)
from lightning_mmd.networks import ConvFeatures, ConvGenerator

RESULTS = Path(__file__).parent / "results" / "conditional.csv"
KINDS = ("none", "learned", "fixed", "product", "learned_apart", "fixed_apart", "product_apart")
SEEDS = {"product": 1, "learned_apart": 2, "fixed_apart": 1, "product_apart": 1}  # less often
FIELDS = [
    "labels", "seed", "updates", "images", "seconds", "fid", "kid", "asked", "rarest",
]  # fmt: skip


def networks(kind: str, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, Latents]:
    """Return generator, critic and latents of a recipe."""
    features: nn.Module = ConvFeatures(shape, 256, (16, 32, 64), activated=True)
    width = 256
    if kind == "none":
        generator = ConvGenerator(shape, 32, (64, 32, 16))
        return generator, LearnedKernelCritic(features, width), Latents(32)
    kind, _, apart = kind.partition("_")
    if kind in ("fixed", "learned"):
        features = ClassFeatures(features, width, 10, learned=kind == "learned")
    else:
        features, width = ClassProductFeatures(features, width, 10), 2560
    generator = ConvGenerator(shape, 32, (64, 32, 16), num_classes=10)
    critic = LearnedKernelCritic(features, width)
    return generator, critic, LabelledLatents(32, 10, paired=not apart)


def train(kind: str, seed: int, updates: int, images: Images) -> tuple[nn.Module, float, int]:
    """Return the averaged generator, processor seconds, and how many images were seen."""
    torch.manual_seed(seed + 1)
    generator, critic, draw = networks(kind, tuple(images.train.shape[1:]))
    rule = standard_rule(critic)
    players = []
    for name, network, own in (
        ("generator", generator, rule.generator_parameters(generator)),
        ("critic", critic, rule.critic_parameters(critic)),
    ):
        adam = torch.optim.Adam(own.values(), 3e-3, (0.0, 0.99))
        players.append(Player(name, network, own, adam))
    average, seen, begin = copy.deepcopy(generator), 0, time.process_time()
    for step in range(updates):
        for player in players:
            player.optimizer.param_groups[0]["lr"] = 3e-3 * (1 - 0.95 * step / updates)
        index = torch.randint(len(images.train), (32 if seen < 16_000 else 64,))
        real = to_unit(images.train[index]), images.labels[index]
        rule.update(Game(*players, real, draw, step=step))
        with torch.no_grad():
            own, new = average.parameters(), generator.parameters()
            torch._foreach_lerp_(list(own), list(new), min(1.0, 10 / (step + 2)))
        seen += len(index)
    return average, time.process_time() - begin, seen


@torch.no_grad()
def asked(judge: Judge, generator: nn.Module, kind: str) -> tuple[float, float]:
    """Return how many of 1,000 samples a class are of it: of all, and of the worst class."""
    if kind == "none":
        return float("nan"), float("nan")
    z = torch.randn(10_000, 32, generator=torch.Generator().manual_seed(98))
    labels = torch.arange(10_000) % 10
    pairs = zip(z.split(500), labels.split(500), strict=True)
    told = torch.cat([judge.classifier(generator(*pair)).argmax(1) for pair in pairs])  # type: ignore[misc]
    shares = [(told == labels)[labels == c].double().mean() for c in range(10)]
    return float(sum(shares) / 10), float(min(shares))


class Uniform(nn.Module):
    """A labelled generator called with latents alone: classes in turn."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to images."""
        return self.generator(z, torch.arange(len(z)) % 10)


def main(root: str, updates: int, seeds: int) -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    keep_memory()
    images = load("MNIST", root, "test")
    judge = new_judge("MNIST", images, CACHE)
    done = {(row["labels"], row["seed"], row["updates"]) for row in read_rows(RESULTS)}
    for seed in range(seeds):
        for kind in KINDS:
            if seed >= SEEDS.get(kind, seeds):
                continue
            if (kind, str(seed), str(updates)) in done:
                continue
            generator, seconds, seen = train(kind, seed, updates, images)
            plain = generator if kind == "none" else Uniform(generator)
            scores, _ = judge(plain, 32, last=False)
            share, worst = asked(judge, generator, kind)
            if kind != "none" and seed == 0:
                z = torch.randn(100, 32, generator=torch.Generator().manual_seed(97))
                picture = generator(z, torch.arange(10).repeat_interleave(10)).detach()
                path = CACHE / "pictures" / f"conditional_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(picture, path, nrow=10, normalize=True, value_range=(-1, 1))
            row = {
                "labels": kind, "seed": seed, "updates": updates, "images": seen,
                "seconds": round(seconds), "fid": f"{scores['fid']:.4g}",
                "kid": f"{scores['kid']:.4g}", "asked": f"{share:.4f}", "rarest": f"{worst:.4f}",
            }  # fmt: skip
            append_row(RESULTS, FIELDS, row)
            print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    main(args.data, args.updates, args.seeds)
