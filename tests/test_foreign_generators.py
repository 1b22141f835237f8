"""MMDGAN with generators that other people write: they train, or the layer is named."""

import copy

import pytest
import torch
from foreign import TutorialGenerator
from lightning.pytorch import Trainer
from tiny import gan
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import ClosedForm, GradientAscent, LearnedKernelCritic
from lightning_mmd.pushforward import DerivativeFallbackWarning

SHAPE = (1, 16, 16)


class UNet(nn.Module):
    """The shape of a diffusion model's network: down, up, skip, normalised; noise to image."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 8, 4, 2, 1))
        self.middle = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.out = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, z):
        h = self.into(z)
        low = self.down(h)
        low = low + self.middle(low)
        return self.out(torch.cat([h, self.up(low)], 1)).tanh()


class Transformer(nn.Module):
    """Sixteen patches of 4x4 pixels through a layer with fused attention."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(16, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.patch = nn.Linear(8, 16)

    def forward(self, z):
        h = self.patch(self.encoder(z[:, None] + self.place))
        return h.view(-1, 4, 4, 4, 4).transpose(2, 3).reshape(-1, *SHAPE)


class Shift(torch.autograd.Function):
    """A custom operation that can be differentiated once, and not forward."""

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g.clone()


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 256)

    def forward(self, z):
        return Shift.apply(self.linear(z)).view(-1, *SHAPE)


def recurrent():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(8, 16, batch_first=True)

        def forward(self, z):
            return self.cell(z[:, None].expand(-1, 16, -1))[0].reshape(-1, *SHAPE)

    return Recurrent()


def dcgan():
    models = pytest.importorskip("torchgan.models", exc_type=ImportError)
    return models.DCGANGenerator(8, out_size=16, out_channels=1, step_channels=4)


GENERATORS = {
    "unet": UNet,
    "transformer": Transformer,
    "lightning tutorial": lambda: TutorialGenerator(8, SHAPE),
    "torchgan": dcgan,
    "lstm": recurrent,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 256)), nn.Unflatten(1, SHAPE)
    ),
}


def gaussian(num, name):
    return torch.randn(num, 8) if name != "unet" else torch.randn(num, *SHAPE)


def fit(generator, mode, name="", **kwargs):
    features = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 12))
    model = gan(
        generator,
        LearnedKernelCritic(features, 12),
        latents=lambda num: gaussian(num, name),
        rule=mode,
        beta=0.1,
        **kwargs,
    )
    x = torch.randn(24, *SHAPE).tanh()
    Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(x), 8))
    return model


def reachable(generator, z):
    """Parameters on which samples depend: a bias before a batch norm moves by rounding only."""
    twin = copy.deepcopy(generator)
    x = twin(z)
    names, parameters = zip(*twin.named_parameters(), strict=True)
    gradients = torch.autograd.grad((x * torch.randn_like(x)).sum(), parameters)
    largest = max(float(g.norm()) for g in gradients)
    return {n for n, g in zip(names, gradients, strict=True) if g.norm() > 1e-10 * largest}


@pytest.mark.filterwarnings("ignore::lightning_mmd.pushforward.DerivativeFallbackWarning")
@pytest.mark.parametrize("mode", [ClosedForm, GradientAscent])
@pytest.mark.parametrize("name", GENERATORS)
def test_it_trains(name, mode):
    generator = GENERATORS[name]()
    before = {n: p.detach().clone() for n, p in generator.named_parameters()}
    reached = reachable(generator, gaussian(8, name))
    model = fit(generator, mode, name)
    assert model.critic_step == 3
    still = [n for n, p in generator.named_parameters() if n in reached and p.equal(before[n])]
    assert not still, f"these did not move: {still}"
    assert parameters_to_vector(generator.parameters()).isfinite().all()


@pytest.mark.filterwarnings("ignore::lightning_mmd.pushforward.DerivativeFallbackWarning")
@pytest.mark.parametrize("name", ["unet", "transformer", "lightning tutorial", "torchgan"])
def test_the_penalty_is_that_of_double_backward(name):
    """Two adversarial runs, in one of which automatic differentiation does it all."""
    results = []
    for method in ("forward", "double_backward"):
        torch.manual_seed(3)
        generator = GENERATORS[name]()
        for m in generator.modules():  # its mask is not replayed between two runs' methods
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        model = fit(generator, GradientAscent, name, method=method, alpha=5.0)
        results.append(parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", [ClosedForm, GradientAscent])
def test_what_cannot_be_differentiated_exactly_is_named(mode):
    with pytest.warns(DerivativeFallbackWarning, match=r"Stubborn.*once_differentiable|Shift"):
        fit(Stubborn(), mode)
