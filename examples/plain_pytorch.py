"""Train digits with any update rule in plain PyTorch: no Lightning, one loop.

    python examples/plain_pytorch.py --rule DeepKernel

`lightning_digits.py` is the same training in Lightning, number for number.
"""

import argparse
from itertools import count

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import lightning_mmd
from lightning_mmd import EmbeddingCritic, Game, Latents, LearnedKernelCritic, Player, UpdateRule
from lightning_mmd.networks import ConvFeatures, ConvGenerator
from lightning_mmd.passes import seeded


def networks(rule: UpdateRule) -> tuple[ConvGenerator, torch.nn.Module]:
    """Return a generator and the kind of critic that the rule trains, equal at every call."""
    torch.manual_seed(0)
    features = ConvFeatures((1, 8, 8), 256, channels=(16, 32))
    embeds = isinstance(rule, lightning_mmd.DeepKernel)
    critic = (EmbeddingCritic if embeds else LearnedKernelCritic)(features, 256)
    return ConvGenerator((1, 8, 8), latent_dim=32, channels=(32, 16)), critic


def batches(batch_size: int = 64) -> DataLoader:
    """Return the digits in [-1, 1] in one order, equal at every call."""
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return DataLoader(digits[order], batch_size, drop_last=True)


def main(rule: UpdateRule, num_updates: int = 200) -> torch.nn.Module:
    """Train; return the generator."""
    generator, critic = networks(rule)
    own, other = rule.generator_parameters(generator), rule.critic_parameters(critic)
    players = (
        Player("generator", generator, own, rule.generator_optimizer(own.values())),
        Player("critic", critic, other, rule.critic_optimizer(other.values())),
    )
    data, steps = batches(), count()
    while True:
        for real in data:
            if (step := next(steps)) == num_updates:
                return generator
            with seeded(torch.device("cpu"), 0, 0, step):  # seed, rank, step
                metrics = rule.update(Game(*players, real, Latents(32), step=step))
            if step % 50 == 0:
                print(f"update {step}: gap {float(metrics['critic/gap']):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", default="ClosedForm")
    main(getattr(lightning_mmd, parser.parse_args().rule)())
