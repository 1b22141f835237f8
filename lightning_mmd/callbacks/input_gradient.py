"""R1, R2 and the gradient penalty of WGAN-GP, for a GAN that we did not write."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_mmd.callbacks.calls import CriticCall, OtherCall, Samples
from lightning_mmd.callbacks.critic_penalty import CriticPenalty
from lightning_mmd.kernel_objectives import SlopePenalty
from lightning_mmd.module import MMDGAN

__all__ = ["InputGradientPenalty"]


class InputGradientPenalty(CriticPenalty):
    r"""Adds a penalty on the critic's slope to the critic's update of any GAN, as it is.

    .. math:: \frac\gamma2 E \big(\|\nabla_x f(\hat x)\| - t\big)^2

    is added to the loss that the critic's optimizer minimises, as `ParametricGradientPenalty` adds
    its penalty: before clipping by Lightning, in automatic and manual optimization, as the mean
    over processes. Real samples, t = 0: R1. Generated samples, t = 0: R2 (a second callback beside
    the first). Interpolated ones, t = 1 and weight 20: the penalty of WGAN-GP.

    The samples are those that the critic was trained on since its last step. Generated ones are
    outputs of the generator, wherever they stand in the critic's input; real ones are all others,
    each once. The critic is called again on them alone, with the labels and whatever else it was
    given beside them; the slope is that in the whole tensor that holds the samples. Where a GAN
    changes generated samples on the way (augmentation, noise), the two cannot be told apart, and an
    error says so. A critic with batch normalisation sees other batches in the penalty than in the
    loss; R1 was not meant for such critics, though it helped one (``docs/evidence.md``).

    Measured on MNIST it is the penalty to try first: FID 0.5 to 0.8 of that without, at equal
    updates, of three GANs that had none (``docs/evidence.md``).

    Logged on the axis of the generator's updates: ``slope/penalty``, the mean above without its
    weight, and ``slope/share``, the norm of the added gradient as a part of the sum of its own and
    the other gradient's norm; ``slope/<generator>/<critic>/...`` where there are several.

    Args:
        weight: Weight gamma, > 0.
        at: ``real``, ``generated``, or ``interpolated`` between pairs of both.
        target: Slope t aimed at, >= 0.
        interval: The penalty is added at every ``interval``-th critic step, with ``interval`` times
            its weight (lazy regularisation), >= 1.
        generator: Attribute of the LightningModule that holds the generator; dots lead further
            down (``"gan.netG"``).
        critic: Likewise, the critic.
        critic_values: Callable from what the critic returns to values (n,) or (n, 1); for a critic
            that ends in a sigmoid ``torch.logit``.
        seed: Of the points between pairs, and of dropout within the penalty.

    Raises:
        ValueError: If an argument is out of range; when fitting begins, if the attributes or their
            optimizers do not fit, or the module is an `MMDGAN`, whose rules have the penalty
            themselves.
        RuntimeError: If the critic's optimizer steps without Lightning's knowledge, or the critic
            has seen no samples of the kind.

    Source:
        Mescheder et al. 2018, arXiv 1801.04406 (R1, R2); Gulrajani et al. 2017, arXiv 1704.00028
        (WGAN-GP, equation 3); Karras et al. 2020, arXiv 1912.04958, appendix B (lazy).

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> r1 = InputGradientPenalty(1.0, generator="netG", critic="netD")
        >>> trainer = Trainer(callbacks=[r1], logger=False)
    """

    prefix = "slope"

    def __init__(
        self,
        weight: float = 1.0,
        at: Literal["real", "generated", "interpolated"] = "real",
        target: float = 0.0,
        interval: int = 1,
        generator: str = "generator",
        critic: str = "critic",
        critic_values: Callable | None = None,
        seed: int = 0,
    ) -> None:
        self.penalty = SlopePenalty(weight, at, target, interval)
        self.generator, self.critic = generator, critic
        self.critic_values, self.seed = critic_values, seed
        self.critic_step = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            generator=self.generator, critic=self.critic, at=self.penalty.at
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, MMDGAN):
            raise ValueError(
                "the rules of MMDGAN have the slope's penalty themselves: give "
                f"slope={self.penalty!r} to GradientAscent or DeepKernel, and remove "
                "InputGradientPenalty. (ClosedForm has none: its witness is a formula.)"
            )
        optimizer = self.find_networks(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)
        self.record(trainer, pl_module, optimizer, others=True)

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = self.moving(self._networks[0])
        if all(p.grad is None for p in parameters):  # the module skipped this step
            return
        calls, others = self.take_calls(trainer), self._calls.take_others()
        if not calls:  # a step of its own for another penalty
            return
        step, self.critic_step = self.critic_step, self.critic_step + 1
        if self.penalty.due(step):
            dtype = parameters[0].dtype
            groups = self._points(real_samples(calls, others, dtype), made_samples(calls, dtype))
            value, added = self.gradient(trainer, parameters, lambda: self._mean(groups))
            added = self.penalty.weight * self.penalty.interval / 2 * added
            share = self.join(parameters, added, self.norm(parameters))
            self.note(pl_module, {"penalty": value, "share": share})

    def _points(
        self, real: list[Samples], made: list[Samples]
    ) -> list[tuple[Samples, Samples | None]]:
        """Return the samples whose slope counts, with their partners where there are any."""
        if self.penalty.at == "generated":
            return [(samples, None) for samples in made]
        if not real:
            raise RuntimeError(
                f"the critic {self.critic!r} steps, but since its last step it has seen no samples "
                "besides those of the generator, so there are no real ones to penalise at. Let the "
                f"module call self.{self.critic}(...) on them with gradients enabled."
            )
        if self.penalty.at == "real":
            return [(samples, None) for samples in real]
        if [len(a.x) for a in real] != [len(b.x) for b in made]:
            raise RuntimeError(
                "at='interpolated' needs as many real as generated samples in every call of the "
                f"critic {self.critic!r}, which saw {[len(a.x) for a in real]} real and "
                f"{[len(b.x) for b in made]} generated ones. Use at='real' or at='generated'."
            )
        return list(zip(real, made, strict=True))

    def _mean(self, groups: list[tuple[Samples, Samples | None]]) -> Tensor:
        """Return the penalty at all points, with a graph."""
        critic = self._networks[0]
        sums, total = [], 0
        for samples, partner in groups:
            num = len(samples.x)

            def witness(x: Tensor, samples: Samples = samples, num: int = num) -> Tensor:
                args, kwargs = samples.inputs(x)
                return self._read(critic(*args, **kwargs), num)

            fake = () if partner is None else (partner.x,)
            points = (samples.x,) if partner is None else self.penalty.points((samples.x,), fake)
            sums.append(num * self.penalty.value(witness, points))
            total += num
        return torch.stack(sums).sum() / total


def made_samples(calls: list[CriticCall], dtype: torch.dtype) -> list[Samples]:
    """Return the generated samples in calls of a critic."""
    found = []
    for call in calls:
        rows = call.rows()
        whole = len(rows) == call.total
        found.append(Samples.of(call, call.slots[0].leaf, None if whole else rows, dtype))
    return found


def real_samples(
    calls: list[CriticCall], others: list[OtherCall], dtype: torch.dtype
) -> list[Samples]:
    """Return the samples in calls of a critic that the generator has not made."""
    found = []
    for other in others:
        slot = calls[0].slots[0].leaf  # where the generator's samples stand, the real ones do too
        leaf = slot if other.spec == calls[0].spec else other.first
        found.append(Samples.of(other, leaf, None, dtype))
    for call in calls:
        rest = torch.ones(call.total, dtype=torch.bool)
        rest[call.rows()] = False
        if rest.any():
            rows = rest.nonzero().flatten()
            found.append(Samples.of(call, call.slots[0].leaf, rows, dtype))
    return found
