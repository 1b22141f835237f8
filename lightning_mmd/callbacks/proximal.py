"""The proximal term that holds a generator near an earlier one, for any GAN."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_mmd.auto_alpha import AutoAlpha
from lightning_mmd.callbacks.added_gradient import AddedGradient
from lightning_mmd.callbacks.foreign import find_network, own_optimizer, require_whole_networks
from lightning_mmd.callbacks.observing import is_observed
from lightning_mmd.closed_form import ClosedForm
from lightning_mmd.module import MMDGAN
from lightning_mmd.parameters import trainable_parameters
from lightning_mmd.passes import Watch, copy_network, full_precision, undisturbed
from lightning_mmd.processes import mean_over_processes, together

__all__ = ["ProximalPoint"]


class ProximalPoint(AddedGradient):
    r"""Holds the generator's samples near those of an earlier generator, in any GAN, as it is.

    .. math:: \frac{1}{2\tau}\, \frac1n \sum_i \| G_\theta(z_i) - G_{\mathrm{old}}(z_i) \|^2

    is added to the loss that the generator's optimizer minimises; the squared norm is the sum over
    an image. G_old is the generator as it was at the last renewal. Between two renewals the
    generator so makes a proximal step of its loss in the space of samples: small tau, small steps.
    The gradient joins the others' before each step of the generator's optimizer and before clipping
    by Lightning, in automatic and manual optimization, as the mean over processes.

    The inputs z_i, with labels, are those of all calls of the generator since its optimizer's last
    step whose output had a gradient; both generators are called on them again. Buffers and the
    random state are left as they were; both see the same dropout.

    Logged on the axis of the generator's updates: ``proximal/distance``, the mean squared norm,
    ``proximal/tau``, and ``proximal/share``, the norm of the added gradient as a part of the sum of
    its own and the other gradient's norm.

    Args:
        tau: Length of the step, > 0, in squared units of the samples. ``"auto"`` holds the term's
            gradient at a twentieth of the other gradient, see `AutoAlpha`, which may be given for
            another part. How short a step helps depends on the GAN: measured on MNIST, tau = 10
            makes a fully connected GAN three times better after as many updates, and GANs that
            are stable without it two and a half times worse (``docs/evidence.md``).
        renew_every: Generator updates from one renewal to the next, >= 2: the first update after
            one has no term, as both generators are equal there.
        generator: Attribute of the LightningModule that holds the generator; dots lead further
            down (``"gan.netG"``).
        generator_output: Callable from what the generator returns to a tensor of samples.
            Default: its first floating-point tensor.
        seed: Of dropout within the term.

    Raises:
        ValueError: If an argument is out of range; when fitting begins, if there is no such
            generator or no optimizer of it, or the module is an `MMDGAN` with `ClosedForm`:
            whatever is added to its step voids the certificate of descent.
        RuntimeError: If the optimizer steps without Lightning's knowledge, or the generator was
            not called since its last step.

    Source:
        arXiv 2605.31369 (MMD GANs with a proximal term).

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ProximalPoint(generator="netG")], logger=False)
    """

    role = "generator"
    prefix = "proximal"
    critic = ""

    def __init__(
        self,
        tau: float | Literal["auto"] | AutoAlpha = "auto",
        renew_every: int = 10,
        generator: str = "generator",
        generator_output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        automatic, self._fixed = AutoAlpha(0.05) if tau == "auto" else tau, 0.0
        self._auto = copy.deepcopy(automatic) if isinstance(automatic, AutoAlpha) else None
        if not isinstance(automatic, AutoAlpha):
            if isinstance(automatic, bool | str) or not 0 < automatic < math.inf:
                raise ValueError(
                    f"tau must be a positive number, 'auto' or an AutoAlpha, got {tau!r}."
                )
            self._fixed = 1 / (2 * automatic)
        if renew_every < 2:
            raise ValueError(
                f"renew_every must be at least 2, got {renew_every}: the generator equals the old "
                "one at the first update after a renewal, where the term is zero."
            )
        self.tau, self.renew_every, self.generator = tau, renew_every, generator
        self.generator_output, self.seed = generator_output, seed
        self.step = 0
        self._inputs: list[tuple[tuple, dict]] = []
        self._records = False
        self._old: nn.Module | None = None
        self._saved: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, MMDGAN) and isinstance(pl_module.rule, ClosedForm):
            raise ValueError(
                "ProximalPoint would add to the step of ClosedForm, whose certificate of descent "
                "holds for that step alone. Lower eta for shorter steps, or take another rule."
            )
        require_whole_networks(self, trainer)
        self._network = network = find_network(self, pl_module, "generator", self.generator)
        optimizer = own_optimizer(trainer, network)
        if optimizer is None or any(group.get("maximize") for group in optimizer.param_groups):
            found = (
                "none holds its parameters" if optimizer is None else "its one has maximize=True"
            )
            raise ValueError(
                f"ProximalPoint adds to a loss that an optimizer of the generator "
                f"{self.generator!r} minimises, but {found}. Let configure_optimizers return one."
            )
        super().on_fit_start(trainer, pl_module)
        self._inputs.clear()
        self._moving = list(trainable_parameters(network).values())
        self._old = copy_network(network).requires_grad_(False)
        if self._saved is not None:
            self._old.load_state_dict(self._saved)
            self._saved = None
        outer = pl_module.get_submodule(self.generator)
        handle = outer.register_forward_hook(Watch(self._note_call), with_kwargs=True)
        self.attach(trainer, pl_module, optimizer, [handle])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._records = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._records = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _samples(self, output: Any) -> Tensor:
        if self.generator_output is not None:
            return self.generator_output(output)
        leaves = tree_flatten(output)[0]
        return next(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())

    def _note_call(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._records and not is_observed() and self._samples(output).requires_grad:
            self._inputs.append(tree_map(_cut_off, (args, kwargs)))

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inputs, self._inputs = self._inputs, []
        parameters = [p for p in self.moving(self._network) if any(p is q for q in self._moving)]
        if all(p.grad is None for p in parameters):  # the module skipped this step
            return
        with together(trainer):
            if not inputs:
                raise RuntimeError(
                    f"the generator {self.generator!r} steps, but the module has not called it "
                    "with gradients since its last step, so there is nothing to hold. The module "
                    f"must call self.{self.generator}(...) itself."
                )
        step, self.step = self.step, self.step + 1
        if step % self.renew_every == 0:
            assert self._old is not None
            self._old.load_state_dict(self._network.state_dict())
            return
        value, added = self._gradient(trainer, parameters, inputs)
        others = self.norm(parameters)
        if self._auto is None:
            weight = self._fixed
        else:
            weight = self._auto.update(float(added.norm()), float(others))
        share = self.join(parameters, weight * added, others)
        tau = added.new_tensor(1 / (2 * weight) if weight else math.inf)
        self.note(pl_module, {"distance": value, "share": share, "tau": tau})

    def _gradient(
        self, trainer: Trainer, parameters: list[nn.Parameter], inputs: list[tuple[tuple, dict]]
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared distance and its flat gradient, means over processes."""
        device, old = parameters[0].device, self._old
        assert old is not None
        old.train(self._network.training)
        counters = (self.seed, trainer.global_rank, self.step)
        kept, self._records = self._records, False
        total, num = torch.zeros((), device=device, dtype=parameters[0].dtype), 0
        with torch.enable_grad(), full_precision(device):
            for args, kwargs in inputs:
                with undisturbed([self._network], device, *counters):
                    x = self._samples(self._network(*args, **kwargs))
                with undisturbed([old], device, *counters), torch.no_grad():
                    before = self._samples(old(*args, **kwargs))
                total, num = total + (x - before).square().sum(), num + len(x)
            gradients = torch.autograd.grad(
                total / num, parameters, allow_unused=True, materialize_grads=True
            )
        self._records = kept
        value = (total / num).detach().reshape(1)
        flat = torch.cat([value, *(g.reshape(-1) for g in gradients)])
        mean, added = mean_over_processes(trainer, flat).split([1, len(flat) - 1])
        return mean.squeeze(0).float(), added

    def state_dict(self) -> dict[str, Any]:
        old = self._saved if self._old is None else self._old.state_dict()
        auto = {} if self._auto is None else self._auto.state_dict()
        return {**super().state_dict(), "step": self.step, "old": old, "tau": auto}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.step = state_dict["step"]
        if self._auto is not None and state_dict["tau"]:
            self._auto.load_state_dict(state_dict["tau"])
        if self._old is None:
            self._saved = state_dict["old"]
        elif state_dict["old"] is not None:
            self._old.load_state_dict(state_dict["old"])


def _cut_off(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
