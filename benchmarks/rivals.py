"""Ours and other GANs in plain PyTorch: the same networks, a loss of a few lines each.

Everything here is trained by one loop, see `race.py`. A contender moves critic and generator on a
batch of real images; both steps see the same generated samples, which saves a pass for all alike.
"""

import copy
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmd import (
    DeepKernel,
    EmbeddingCritic,
    FeatureMatching,
    Game,
    GradientAscent,
    Latents,
    LearnedKernelCritic,
    Player,
    SlopePenalty,
    UpdateRule,
)
from lightning_mmd.kernel_objectives import Repulsive, deep_mmd2
from lightning_mmd.kernels import Gaussian, Kernel, RationalQuadratic, SumKernel
from lightning_mmd.networks import ConvFeatures, ConvGenerator
from lightning_mmd.objectives import Hinge, Linear, Logistic

LATENT_DIM = 32
Spec = dict[str, Any]


class Contender(Protocol):
    """A training algorithm with its networks and optimizers."""

    generator: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def update(self, real: Tensor, step: int) -> None:
        """Move critic and generator on a batch of images in [-1, 1]."""
        ...


def adam(parameters: Iterable[Tensor], lr: float, spec: Spec) -> torch.optim.Adam:
    """Return the optimizer that all contenders have."""
    return torch.optim.Adam(
        parameters, lr, (spec.get("beta1", 0.0), 0.99), fused=spec.get("fused", False)
    )


def new_generator(shape: tuple[int, ...], spec: Spec) -> ConvGenerator:
    """Return the generator of `configs/mnist_closed_form.yaml`."""
    width = spec.get("generator_width", 16)
    return ConvGenerator(shape, LATENT_DIM, (4 * width, 2 * width, width))


def new_features(shape: tuple[int, ...], spec: Spec, spectral: bool) -> nn.Module:
    """Return the features of `configs/mnist_closed_form.yaml` and an activation."""
    width = spec.get("width", 16)
    features = nn.Sequential(ConvFeatures(shape, 256, (width, 2 * width, 4 * width)), nn.SiLU())
    if spec.get("norm") == "none":
        _strip(features)
    return spectrally_normalised(features) if spectral else features


def _strip(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(network, name, nn.Identity())
        else:
            _strip(child)


def spectrally_normalised(network: nn.Module) -> nn.Module:
    """Divide each linear and convolutional layer by its largest singular value."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)
    return network


def slope2(values: Tensor, x: Tensor) -> Tensor:
    """Return E ||d values / d x||^2, to be differentiated again."""
    (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return slope.flatten(1).square().sum(1).mean()


class Rival:
    """A GAN of two losses.

    Args:
        shape: Shape of an image.
        spec: Options: ``lr``, ``lr_critic``, those of the loss.
    """

    spectral = False
    outputs = 1

    def __init__(self, shape: tuple[int, ...], spec: Spec) -> None:
        self.spec = spec
        self.generator = new_generator(shape, spec)
        head = nn.Linear(256, self.outputs)
        if self.spectral:
            spectrally_normalised(head)
        self.critic = nn.Sequential(new_features(shape, spec, self.spectral), head)
        lr = spec["lr"]
        self.optimizers = [
            adam(self.generator.parameters(), lr, spec),
            adam(self.critic.parameters(), spec.get("lr_critic", lr), spec),
        ]

    def update(self, real: Tensor, step: int) -> None:
        z = torch.randn(len(real), LATENT_DIM)
        fake = self.generator(z)
        self._step(self.optimizers[1], self.critic_loss(real, fake.detach()))
        self._step(self.optimizers[0], self.generator_loss(real, fake, z, step))

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        raise NotImplementedError

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        raise NotImplementedError


class NonSaturating(Rival):
    """Goodfellow et al. 2014 with R1 (Mescheder et al. 2018)."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real.requires_grad_()
        values = self.critic(real)
        loss = F.softplus(-values).mean() + F.softplus(self.critic(fake)).mean()
        return loss + self.spec.get("gamma", 1.0) / 2 * slope2(values, real)

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        return F.softplus(-self.critic(fake)).mean()


class HingeSpectral(Rival):
    """Miyato et al. 2018: the hinge under spectral normalisation."""

    spectral = True

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - self.critic(real)).mean() + F.relu(1 + self.critic(fake)).mean()

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        return -self.critic(fake).mean()


class WassersteinPenalised(Rival):
    """Gulrajani et al. 2017, WGAN-GP, one critic step an update."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        between = torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        gap = self.critic(real).mean() - self.critic(fake).mean()
        return self.spec.get("gamma", 10.0) * penalty - gap

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        return -self.critic(fake).mean()


class Relativistic(Rival):
    """Huang et al. 2025, R3GAN's loss: relativistic pairs, R1 and R2."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = real.requires_grad_(), fake.requires_grad_()
        on_real, on_fake = self.critic(real), self.critic(fake)
        penalty = slope2(on_real, real) + slope2(on_fake, fake)
        return F.softplus(on_fake - on_real).mean() + self.spec.get("gamma", 1.0) / 2 * penalty

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            on_real = self.critic(real)
        return F.softplus(on_real - self.critic(fake)).mean()


class ProximalMMD(Rival):
    """arXiv 2605.31369: an MMD GAN under a gradient penalty, the generator held near its past."""

    outputs = 16

    def __init__(self, shape: tuple[int, ...], spec: Spec) -> None:
        super().__init__(shape, spec)
        self.past = copy.deepcopy(self.generator)
        self.kernel = SumKernel([RationalQuadratic(alpha=a) for a in (0.2, 0.5, 1.0, 2.0, 5.0)])

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        e_real, e_fake = self.critic(real), self.critic(fake)
        between = torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1)).requires_grad_()
        e = self.critic(between)
        witness = self.kernel(e, e_real).mean(1) - self.kernel(e, e_fake).mean(1)
        (slope,) = torch.autograd.grad(witness.sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return self.spec.get("gamma", 1.0) * penalty - deep_mmd2(self.kernel, e_real, e_fake)

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        if step % self.spec.get("renew", 1000) == 0:
            self.past.load_state_dict(self.generator.state_dict())
        with torch.no_grad():
            past, e_real = self.past(z), self.critic(real)
        near = (fake - past).square().flatten(1).sum(1).mean() / (2 * self.spec.get("tau", 1000.0))
        return deep_mmd2(self.kernel, e_real, self.critic(fake)) + near


class FrozenFeatures:
    """GFMN (dos Santos et al. 2019): gaps of means and squares in a frozen classifier's features.

    The features are all of its activations, scaled to variance 1 on the data. The classifier was
    trained on labels, by another seed than the judge's; its means of the data are exact, those of
    the samples are Adam's moving averages of the gap, as the paper has it.
    """

    def __init__(
        self, shape: tuple[int, ...], spec: Spec, network: nn.Module, data: Tensor
    ) -> None:
        self.spec = spec
        self.generator = new_generator(shape, spec)
        self.optimizers = [adam(self.generator.parameters(), spec["lr"], spec)]
        self.layers = list(network.children())
        with torch.no_grad():
            embedded = [self.activations(part) for part in data.split(1000)]
            mean = torch.stack([e.mean(0) for e in embedded]).mean(0)
            square = torch.stack([e.square().mean(0) for e in embedded]).mean(0)
        self.scale = (square - mean.square()).clamp_min(1e-6).rsqrt()
        self.target = torch.cat([mean * self.scale, square * self.scale.square()])
        self.gap = nn.Parameter(torch.zeros_like(self.target))
        self.average = torch.optim.Adam([self.gap], spec.get("lr_average", 1e-2), (0.9, 0.999))

    def activations(self, x: Tensor) -> Tensor:
        """Return the outputs of all activations, side by side, (n, r)."""
        outputs = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.SiLU):
                outputs.append(x.flatten(1))
        return torch.cat(outputs, 1)

    def update(self, real: Tensor, step: int) -> None:
        """Move the averages of the gap, then the generator along them."""
        e = self.activations(self.generator(torch.randn(len(real), LATENT_DIM))) * self.scale
        gap = self.target - torch.cat([e.mean(0), e.square().mean(0)])
        self.average.zero_grad()
        self.gap.grad = self.gap.detach() - gap.detach()
        self.average.step()
        Rival._step(self.optimizers[0], (self.gap.detach() * gap).sum())


class Ours:
    """An update rule of this package in a plain loop."""

    def __init__(self, shape: tuple[int, ...], spec: Spec) -> None:
        self.spec = spec
        self.rule = new_rule(spec)
        self.generator = new_generator(shape, spec)
        self.critic = new_critic(shape, spec, self.rule)
        self.draw = Latents(LATENT_DIM)
        own = self.rule.generator_parameters(self.generator)
        other = self.rule.critic_parameters(self.critic)
        lr = spec["lr"]
        self.optimizers = [
            adam(own.values(), lr, spec),
            adam(other.values(), spec.get("lr_critic", lr), spec),
        ]
        self.players = (
            Player("generator", self.generator, own, self.optimizers[0]),
            Player("critic", self.critic, other, self.optimizers[1]),
        )

    def update(self, real: Tensor, step: int) -> None:
        self.rule.update(Game(*self.players, real, self.draw, step=step))


def new_kernel(widths: list[float]) -> Kernel:
    """Return a Gaussian kernel, or the mean of several."""
    kernels = [Gaussian(width) for width in widths]
    return (
        kernels[0]
        if len(kernels) == 1
        else SumKernel(kernels, weights=[1 / len(kernels)] * len(kernels))
    )


def new_rule(spec: Spec) -> UpdateRule:
    """Return a rule of this package."""
    slope = spec.get("slope", 0.0)
    penalty = (
        SlopePenalty(
            slope,
            at=spec.get("slope_at", "real"),
            target=spec.get("slope_target", 0.0),
            interval=spec.get("slope_interval", 1),
        )
        if slope
        else None
    )
    if spec["method"] == "deep_kernel":
        return DeepKernel(
            kernel=new_kernel(spec.get("widths", [1.0])),
            objective=Repulsive(spec.get("lower", 0.25), spec.get("upper", 4.0)),
            slope=penalty,
            alpha=spec.get("alpha", 0.0),
        )
    objectives = {"logistic": Logistic, "hinge": Hinge, "linear": Linear}
    return GradientAscent(
        alpha=spec.get("alpha", 0.0),
        beta=spec.get("beta", 0.0),
        objective=objectives[spec.get("objective", "logistic")](),
        slope=penalty,
        share_samples=True,
        matching=FeatureMatching(spec["matching"]) if spec.get("matching") else None,
    )


def new_critic(shape: tuple[int, ...], spec: Spec, rule: UpdateRule) -> nn.Module:
    """Return the critic that a rule trains."""
    if isinstance(rule, DeepKernel):
        features = new_features(shape, spec, False)[0]
        return EmbeddingCritic(
            features,
            256,
            spec.get("dim", 64),
            spectral_norm=spec.get("spectral", True),
            scale=spec.get("scale", 4.0),
        )
    critic = LearnedKernelCritic(new_features(shape, spec, spec.get("spectral", False)), 256)
    if spec.get("spectral", False):
        nn.utils.parametrizations.spectral_norm(critic, "weights")
    return critic


RIVALS: dict[str, type[Rival]] = {
    "nonsaturating_r1": NonSaturating,
    "hinge_spectral": HingeSpectral,
    "wgan_gp": WassersteinPenalised,
    "relativistic_r1_r2": Relativistic,
    "mmd_proximal": ProximalMMD,
}


def matching_loss(real: Tensor, fake: Tensor, spec: Spec) -> Tensor:
    """Return what `FeatureMatching` adds to a generator's loss."""
    return FeatureMatching(spec.get("matching", 6.0)).loss(real, fake)


class MatchedRelativistic(Relativistic):
    """A trial: R3GAN's loss, and MMD^2 of the critic's features in the generator's."""

    def generator_loss(self, real: Tensor, fake: Tensor, z: Tensor, step: int) -> Tensor:
        features, head = self.critic[0], self.critic[1]
        with torch.no_grad():
            on_real = features(real)
        on_fake = features(fake)
        value = F.softplus(head(on_real) - head(on_fake)).mean()
        return value + matching_loss(on_real, on_fake, self.spec)


RIVALS["matched_relativistic"] = MatchedRelativistic
