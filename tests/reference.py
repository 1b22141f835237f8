"""The textbook, slowly: what the package computes cleverly, computed plainly.

Nothing here imports the package. Explicit Jacobians row by row, dense solves, double backward
through both networks, central differences; and the networks on which both are compared.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

SEED = 11  # of dropout masks: what is compared with a reference starts from the same random state


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


def gradient_penalty(
    critic: nn.Module, generator: nn.Module, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """||L f||^2, its gradient in the critic's parameters and L f, by naive double backward.

    Runs on copies, from a fixed random state; the generator's parameters with requires_grad count.
    """
    critic, generator = copy.deepcopy(critic), copy.deepcopy(generator)
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        mean = critic(generator(z)).mean()
        parameters = [p for p in generator.parameters() if p.requires_grad]
        gradient = flat(
            torch.autograd.grad(mean, parameters, create_graph=True, materialize_grads=True)
        )
        penalty = gradient.square().sum()
        weights = [p for p in critic.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(penalty, weights, materialize_grads=True)
    return penalty.detach(), flat(slopes), gradient.detach()


def rows_of_jacobian(function: Callable[[dict[str, Tensor]], Tensor], module: nn.Module) -> Tensor:
    """Jacobian, entry by entry, of function(parameters) in a module's trainable parameters."""
    parameters = {
        n: p.detach().clone().requires_grad_()
        for n, p in module.named_parameters()
        if p.requires_grad
    }
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = function(parameters).reshape(-1)
    rows = [
        torch.autograd.grad(
            output, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for output in outputs
    ]
    return torch.stack([flat(row) for row in rows])


def sample_jacobian(generator: nn.Module, z: Tensor) -> Tensor:
    """Jacobian of all samples in the generator's parameters, (n * d, P)."""
    generator = copy.deepcopy(generator)
    return rows_of_jacobian(lambda p: functional_call(generator, p, (z,)), generator)


def embedding_jacobian(features: nn.Module, generator: nn.Module, z: Tensor) -> Tensor:
    """Jacobian J of the mean embedding in the generator's parameters, (r, P)."""
    features, generator = copy.deepcopy(features), copy.deepcopy(generator)
    return rows_of_jacobian(
        lambda p: features(functional_call(generator, p, (z,))).mean(0), generator
    )


def solve_dense(jacobian: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Solve (alpha J J^T + beta I) w = gap."""
    gramian = alpha * jacobian @ jacobian.T + beta * torch.eye(len(gap), dtype=gap.dtype)
    return torch.linalg.solve(gramian, gap)


def central_differences(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], step: float = 1e-5
) -> Tensor:
    """Gradient of a scalar in every entry of some tensors, which are moved and put back."""
    slopes = []
    for parameter in parameters:
        entries = parameter.detach().view(-1)
        for i in range(len(entries)):
            middle = entries[i].item()
            values = []
            for shifted in (middle + step, middle - step):
                entries[i] = shifted
                values.append(float(function().detach()))
            entries[i] = middle
            slopes.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(slopes)


def all_batches(population: Tensor, size: int) -> list[Tensor]:
    """List all batches, equally likely, of independent draws from a finite population."""
    return [torch.stack(rows) for rows in itertools.product(population, repeat=size)]


# Networks: latents of shape (3,); samples of shape (4,), (2, 4, 4) or (3, 4).


class View(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


class Tied(nn.Module):
    """A weight under two names and a layer that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.second.weight = self.first.weight

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.tanh(self.second(z))))
        return self.last(torch.tanh(self.first(h)))


class Attention(nn.Module):
    """Self-attention of 3 tokens of length 4, by the formula or fused."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.fused:
            return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + torch.softmax(q @ k.mT / math.sqrt(4), -1) @ v


class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class _Sine(torch.autograd.Function):
    """A function of one's own without a jvp; its backward can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, c):
        return c * ctx.saved_tensors[0].cos()


class _SineOnce(_Sine):
    """The same, with a backward that cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        return c * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self.function = _SineOnce if once else _Sine

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class UsedTwice(nn.Module):
    """A spectrally normalised layer applied twice, after another power iteration each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(z)))))


class Counting(nn.Module):
    """Every pass is scaled by a state that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.passes = nn.Linear(3, 4), 0

    def forward(self, z: Tensor) -> Tensor:
        self.passes += 1
        return self.passes * torch.tanh(self.layer(z))


def spectral_norm(module: nn.Module) -> nn.Module:
    """Normalise, then move the weight: the power iteration has not converged, as in training."""
    module = parametrizations.spectral_norm(module)
    nn.init.normal_(module.parametrizations.weight.original)
    return module


def old_spectral_norm(module: nn.Module) -> nn.Module:
    module = nn.utils.spectral_norm(module)
    nn.init.normal_(module.weight_orig)
    return module


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, yet in many a network
        module = nn.utils.weight_norm(module)
    module.weight = module.weight.detach()  # with its graph it could not be copied
    return module


def identity(module: nn.Module) -> nn.Module:
    return module


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


Wrap = Callable[[nn.Module], nn.Module]


def mlp_generator(*middle: nn.Module, wrap: Wrap = identity) -> nn.Module:
    first, last = wrap(nn.Linear(3, 5)), wrap(nn.Linear(5, 4))
    return nn.Sequential(first, *middle, nn.SiLU(), last, nn.Tanh())


def mlp_critic(*middle: nn.Module, wrap: Wrap = identity) -> nn.Module:
    first, last = wrap(nn.Linear(4, 5)), wrap(nn.Linear(5, 1))
    return nn.Sequential(first, *middle, nn.SiLU(), last)


def conv_generator(norm: Wrap, wrap: Wrap = identity) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 16),
        View(4, 2, 2),
        norm(4),
        nn.SiLU(),
        nn.Upsample(scale_factor=2),
        wrap(nn.Conv2d(4, 2, 3, padding=1)),
        norm(2),
        nn.Tanh(),
    )


def conv_critic(norm: Wrap, wrap: Wrap = identity) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Conv2d(2, 4, 3, stride=2, padding=1)),
        norm(4),
        nn.SiLU(),
        nn.Flatten(),
        wrap(nn.Linear(16, 1)),
    )


def token_generator(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 12), View(3, 4), middle, nn.Tanh())


def token_critic(middle: nn.Module) -> nn.Module:
    return nn.Sequential(middle, nn.Flatten(), nn.SiLU(), nn.Linear(12, 1))


def transformer(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout, F.gelu, batch_first=True)


def partly_frozen() -> nn.Module:
    generator = mlp_generator()
    generator[0].requires_grad_(False)
    generator[2].bias.requires_grad_(False)
    return generator


# What the announcement of a fallback must say; None: plain forward mode serves.
UNFUSED, HELD = "unfused attention", "held power iterations"
TWO_REVERSE_PASSES = "two reverse passes"
APPROXIMATE = "APPROXIMATE"
GENERATORS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "mlp": (mlp_generator, None),
    "batch norm": (lambda: conv_generator(nn.BatchNorm2d), None),
    "batch norm, eval": (lambda: conv_generator(nn.BatchNorm2d).eval(), None),
    "group norm": (lambda: conv_generator(group_norm), None),
    "instance norm": (lambda: conv_generator(instance_norm), None),
    "dropout": (lambda: mlp_generator(nn.Dropout(0.4)), None),
    "tied": (Tied, None),
    "partly frozen": (partly_frozen, None),
    "attention": (lambda: token_generator(Attention(fused=False)), None),
    "transformer with dropout": (lambda: token_generator(transformer(0.3)), None),
    "lstm": (lambda: token_generator(Recurrent()), None),
    "spectral norm, eval": (lambda: mlp_generator(wrap=spectral_norm).eval(), None),
    "spectral norm": (lambda: mlp_generator(wrap=spectral_norm), HELD),
    "old spectral norm": (lambda: conv_generator(nn.BatchNorm2d, old_spectral_norm), HELD),
    "old spectral norm, alone": (lambda: old_spectral_norm(nn.Linear(3, 4)), HELD),
    "spectral norm, used twice": (UsedTwice, TWO_REVERSE_PASSES),
    "fused attention": (lambda: token_generator(Attention(fused=True)), UNFUSED),
    "multi-head attention": (lambda: token_generator(MultiheadAttention()), UNFUSED),
    "multi-head, eval": (lambda: token_generator(MultiheadAttention()).eval(), UNFUSED),
    "transformer": (lambda: token_generator(transformer(0.0)), UNFUSED),
    "transformer, eval": (lambda: token_generator(transformer(0.3)).eval(), UNFUSED),
    "weight norm": (lambda: mlp_generator(wrap=parametrizations.weight_norm), TWO_REVERSE_PASSES),
    "old weight norm": (lambda: mlp_generator(wrap=old_weight_norm), TWO_REVERSE_PASSES),
    "function without jvp": (lambda: mlp_generator(Sine(once=False)), TWO_REVERSE_PASSES),
}
CRITICS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "mlp": (mlp_critic, mlp_generator),
    "spectral norm": (lambda: mlp_critic(wrap=spectral_norm), mlp_generator),
    "old spectral norm": (lambda: mlp_critic(wrap=old_spectral_norm), mlp_generator),
    "weight norm": (lambda: mlp_critic(wrap=parametrizations.weight_norm), mlp_generator),
    "dropout": (
        lambda: mlp_critic(nn.Dropout(0.4)),
        lambda: mlp_generator(nn.Dropout(0.4)),
    ),
    "layer norm": (lambda: mlp_critic(nn.LayerNorm(5)), mlp_generator),
    "batch norm": (
        lambda: conv_critic(nn.BatchNorm2d),
        lambda: conv_generator(nn.BatchNorm2d),
    ),
    "batch norm, eval": (lambda: mlp_critic(nn.BatchNorm1d(5)).eval(), mlp_generator),
    "group norm": (lambda: conv_critic(group_norm), lambda: conv_generator(group_norm)),
    "instance norm": (lambda: conv_critic(instance_norm), lambda: conv_generator(instance_norm)),
    "attention": (
        lambda: token_critic(Attention(fused=False)),
        lambda: token_generator(Attention(fused=False)),
    ),
    "fused attention": (
        lambda: token_critic(Attention(fused=True)),
        lambda: token_generator(Attention(fused=False)),
    ),
    "transformer": (
        lambda: token_critic(transformer(0.3)),
        lambda: token_generator(transformer(0.3)),
    ),
    "lstm": (lambda: token_critic(Recurrent()), lambda: token_generator(Recurrent())),
}


def shake(module: nn.Module) -> nn.Module:
    """Move biases and the scales of norms off zero and one, so that each of them matters."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter.data, 0.5, 0.3)
    return module


def critic_for(x: Tensor) -> nn.Module:
    """A critic that takes these samples."""
    shape = tuple(x.shape[1:])
    if shape == (4,):
        return shake(mlp_critic())
    if shape == (3, 4):
        return shake(token_critic(Attention(fused=True)))
    return shake(conv_critic(nn.BatchNorm2d, spectral_norm))
