r"""Generator steps on embeddings of a whole batch: MMD^2 in the critic's own features."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mmd.game import Game
from lightning_mmd.kernel_objectives import deep_mmd2
from lightning_mmd.kernels import Kernel, RationalQuadratic, SumKernel
from lightning_mmd.latents import select
from lightning_mmd.parted import PartedPass, SharedEmbedding, pull_back

__all__ = ["EmbeddingStep", "Embeds", "FeatureMatching", "ascent_of_mmd2"]

Inputs = tuple[Tensor, ...]


@dataclass
class FeatureMatching:
    r"""Lets the generator descend MMD^2 in the features of its critic, beside the critic's value.

    .. math:: \frac\lambda2\,\mathrm{MMD}^2_k\big(s\,\varphi(x),\; s\,\varphi(G(z))\big), \qquad
        s^{-2} = \mathrm{tr}\,\mathrm{Cov}\,\varphi(x)

    is added to what the generator minimises; the critic is trained as before. A critic tells where
    single samples should go; MMD^2 sees the batch as a set, so that it also pushes samples apart
    that are too much alike. The scale s makes the kernel's bandwidth a multiple of the spread of
    the real features, however the critic scales them. Expectations are unbiased means over the
    pairs of the batch, of all processes; the features of each sample are sent between processes.

    Args:
        weight: Weight lambda, > 0.
        kernel: Kernel on scaled features. Default: the mean of rational quadratic kernels with
            alpha 0.5, 1 and 2 and bandwidth 1.

    Raises:
        ValueError: If the weight is out of range.
        TypeError: If ``kernel`` is no kernel.

    Source:
        Salimans et al. 2016, arXiv 1606.03498, section 3.1 (means of features); Li et al. 2017,
        arXiv 1705.08584 (kernels on a learned embedding). The sum with an adversarial critic is
        this package's.
    """

    weight: float = 6.0
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"FeatureMatching needs a finite weight > 0, got {self.weight}.")
        if self.kernel is None:
            kernels = [RationalQuadratic(alpha) for alpha in (0.5, 1.0, 2.0)]
            self.kernel = SumKernel(kernels, [1 / 3] * 3)
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel such as Gaussian(1.0), got {self.kernel!r}.")
        self._kernel = self.kernel

    def scale(self, real: Tensor) -> Tensor:
        """Return s of embeddings (n, r) of real samples."""
        spread = real.detach().var(0).sum()
        return spread.clamp_min(torch.finfo(spread.dtype).tiny).rsqrt()

    def loss(self, real: Tensor, fake: Tensor, paired: bool = False) -> Tensor:
        """Return weight / 2 times MMD^2 of embeddings (n, r) and (m, r), see `deep_mmd2`."""
        s = self.scale(real)
        return self.weight / 2 * deep_mmd2(self._kernel, s * real, s * fake, paired)

    def ascent(
        self,
        num: int,
        e: Tensor,
        real: Tensor,
        fake: Tensor,
        itself: Tensor,
        paired: bool = False,
    ) -> Tensor:
        """Return what samples ascend one by one, see :func:`ascent_of_mmd2`."""
        s = self.scale(real)
        scaled = s * e, s * real, s * fake
        return self.weight / 2 * ascent_of_mmd2(self._kernel, num, *scaled, itself, paired)


def ascent_of_mmd2(
    kernel: Kernel,
    num: int,
    e: Tensor,
    real: Tensor,
    fake: Tensor,
    itself: Tensor,
    paired: bool = False,
) -> Tensor:
    r"""Return a sum whose gradient in row i of ``e`` is -d MMD^2 / d e_i, the others held.

    .. math:: \frac2n \sum_i \Big( \frac1m \sum_r k(e_i, e(x_r))
        - \frac1{N-1} \sum_{j \ne i} k(e_i, e(y_j)) \Big)

    Args:
        kernel: The kernel k.
        num: Generated samples n of this process.
        e: Embeddings of some of them, at the places where they are moved, (k, d).
        real: Embeddings of all real samples, (m, d).
        fake: Embeddings of all N generated samples, without a graph.
        itself: Matrix (k, N), 1 where a column is the sample of its row, else 0.
        paired: Whether the real sample of a row's own index is left out too, m = N.
    """
    others = (kernel(e, fake) * (1 - itself)).sum() / (len(fake) - 1)
    gram = kernel(e, real)
    towards = (gram * (1 - itself)).sum() / (len(real) - 1) if paired else gram.mean(1).sum()
    return 2 / num * (towards - others)


class EmbeddingStep:
    """Embeddings of a batch, real and generated, as a generator's step needs them.

    Args:
        game: What is played.
        z: Latents, and labels where there are any, of the generated samples.
        generated: The generator's pass over them.
        critic: Module from samples, and labels, to embeddings (n, d).

    Attributes:
        of_real: Embeddings of real samples of all processes, without a graph.
        of_fake: Embeddings of generated samples.
    """

    def __init__(self, game: Game, z: Inputs, generated: PartedPass, critic: nn.Module) -> None:
        self._game, self._z, self._generated = game, z, generated
        real, parts = game.target(z), generated.parts
        with torch.no_grad():
            kept = PartedPass(critic, lambda k, _: select(real, parts[k]), parts, keep=False)
        self.of_real = SharedEmbedding(kept, game.processes).everyone.detach()

        def inputs(k: int, with_graph: bool) -> Inputs:
            samples = generated.part(k) if with_graph else generated.whole[parts[k]]
            return (samples, *select(z[1:], parts[k]))

        self.of_fake = SharedEmbedding(PartedPass(critic, inputs, parts), game.processes)

    def gradient(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the gradient of a loss of the embeddings, real and generated, in the generator.

        It is that of all processes.
        """
        everyone, processes = self.of_fake.everyone, self._game.processes
        (cotangent,) = torch.autograd.grad(loss(self.of_real, everyone), everyone)
        terms = [(self.of_fake, cotangent)]
        return processes.mean(pull_back(self._game.generator, terms, processes))

    def moved_gradient(self, ascent: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        """Return the gradient through what hooks put in place of the samples' gradients.

        Call it before :meth:`gradient`, which frees the graph.

        Args:
            ascent: Function of embeddings (k, d) of some samples, and of the matrix (k, N) that
                says which of all samples each row is, to what they ascend.

        Returns:
            The gradient, of all processes; None where the hooks leave the step alone.
        """
        game, generated, everyone = self._game, self._generated, self.of_fake.everyone.detach()
        total = everyone.new_zeros(())
        for k, part in enumerate(generated.parts):
            rows = self.of_fake.rows(k)
            itself = torch.zeros(part.stop - part.start, len(everyone), device=everyone.device)
            itself[range(len(itself)), range(rows.start, rows.stop)] = 1
            labels = select(self._z[1:], part)

            def gradient_at(
                x: Tensor, k: int = k, itself: Tensor = itself, labels: Inputs = labels
            ) -> Tensor:
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    e = self.of_fake.embedding.again(k, x, *labels).to(everyone.dtype)
                    return torch.autograd.grad(ascent(e, itself), x)[0]

            moved = game.moved(generated.whole[part], gradient_at)
            if moved is None:
                return None
            along = (generated.part(k) * moved).sum()
            total = total - game.generator.gradient(along, retain_graph=True)
        return game.processes.mean(total)


class Embeds(nn.Module):
    """A critic that returns its features."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map samples, and labels, to features (n, r)."""
        return self.critic(*inputs, embedding=True)
