"""What may be wrong before training: versions, devices, and gradients on several processes."""

import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException
from torch.optim import SGD

from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.data import SampleDataModule, TensorSamples
from lightning_mmd.module import MMDGAN
from lightning_mmd.rates import largest_gramian_eigenvalue, max_stable_critic_lr
from lightning_mmd.versions import find_versions
from lightning_mmd.witness import MeanEmbedding

__all__ = [
    "Parity",
    "advise",
    "check_parity",
    "describe_devices",
    "examine",
    "suspicious_layers",
]

_TOLERANCE = 1e-6
_CURES = {
    "takes statistics over the batch of its own process": "Use GroupNorm or LayerNorm, or train "
    "on GPUs with --trainer.sync_batchnorm true.",
    "draws random numbers": "Processes draw different ones, as they should, so equal gradients "
    "cannot be expected. Check again without it (dropout: p = 0).",
}
_NUM_STEPS = 2  # the second also penalises along the gradient that the first one left
_WORLD_SIZE = 2
_MOST_ITERATIONS = 3  # of conjugate gradients, which amplify rounding the longer they go on


def examine(model: MMDGAN | None = None) -> bool:
    """Print versions, devices and, for a model, the parity of its gradients; name what is wrong.

    Args:
        model: The user's, or None to look at the installation alone.

    Returns:
        Whether nothing is wrong.
    """
    versions, problems = find_versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if model is not None:
        model.check_networks()
    rows = [] if model is None else check_parity(model)  # it forks: before anything wakes a GPU
    print("\n".join(describe_devices()))
    if model is None:
        print("no --config: gradients were not checked")
    else:
        print("relative error of two CPU processes against one on the whole batch, float64:")
        for name, error in rows:
            print(f"  {name}: {error:.2g}{'' if error <= _TOLERANCE else '  FAILS'}")
        if not all(error <= _TOLERANCE for _, error in rows):
            problems += _explain(model)
        print("\n".join(advise(model)))
    for problem in problems:
        print(f"problem: {problem}")
    print("something is wrong" if problems else "all is well")
    return not problems


def _explain(model: MMDGAN) -> list[str]:
    z = model.fixed_latents(8)
    networks = {"generator": (model.generator, z), "critic": (model.critic, model.sample(8, z))}
    found = [
        f"{network}.{layer} {what}. {_CURES[what]}"
        for network, (module, inputs) in networks.items()
        for layer, what in suspicious_layers(module, inputs).items()
    ]
    return found or [
        "gradients depend on how a batch is shared out, and no layer explains it. Look for "
        "statistics of the batch or random numbers in the networks' own forward methods."
    ]


def advise(model: MMDGAN, num_latents: int = 256) -> list[str]:
    r"""Say what the generator's parametric Gramian means for learning rates, at its weights now.

    Gradient ascent on the weights of f = <w, phi> is stable for rates below
    :math:`2 / (\alpha\lambda_{max}(JJ^T) + \beta)`, alpha times ``penalty_interval`` where the
    penalty is lazy.

    Args:
        model: The user's; it is not changed.
        num_latents: Latents that the Gramian is estimated with.

    Returns:
        Lines to print; one alone where the critic has no feature map.

    Source:
        See `max_stable_critic_lr` and `largest_gramian_eigenvalue`.
    """
    critic = getattr(model.critic, "_orig_mod", model.critic)
    if not isinstance(critic, LearnedKernelCritic):
        return ["advice on learning rates needs a LearnedKernelCritic"]
    critic, generator = copy.deepcopy(critic), copy.deepcopy(model.generator)
    z = model.fixed_latents(num_latents)
    embedding = MeanEmbedding(critic.feature_map(), generator, z)
    eigenvalue = largest_gramian_eigenvalue(embedding)
    alpha, weight = model.alpha * model.penalty_interval, "alpha"
    if model.penalty_interval > 1:
        weight = "alpha * penalty_interval"
    bound = max_stable_critic_lr(alpha, model.beta, eigenvalue)
    return [
        f"largest eigenvalue of the parametric Gramian, at these weights: {eigenvalue:.3g}",
        "gradient ascent on the critic's weights by plain SGD (critic_mode='adversarial') is "
        f"stable below a learning rate of 2 / ({weight} * {eigenvalue:.3g} + beta) = {bound:.3g}",
    ]


def describe_devices() -> list[str]:
    """List the devices that Lightning could train on, one a line."""
    lines = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        lines.append(f"cuda:{index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16} bf16")
    if torch.version.cuda and not torch.cuda.device_count():
        lines.append(f"cuda: none found, though torch is built for CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    return lines


class Parity(NamedTuple):
    """One row of the result of :func:`check_parity`.

    Attributes:
        name: What was compared.
        error: Norm of the difference over the norm of the one process's vector.
    """

    name: str
    error: float


def check_parity(model: MMDGAN, batch_size: int = 8) -> list[Parity]:
    r"""Compare gradients of two CPU processes with those of one on the concatenated batch.

    Two steps of the model's own mode, penalties included, on real samples made of random numbers,
    in float64, by short steps of plain SGD. Nothing else of the training takes part: optimizers,
    schedules, clipping and damping see the gradient only after it has been averaged. At most three
    conjugate-gradient iterations are made: more of them amplify rounding.

    Args:
        model: Generator and critic in the mode to test. It is not changed.
        batch_size: Samples of each process, even and at least 4.

    Returns:
        The largest relative error over the steps of the gradient of each network, in closed form
        also of the critic's solved weights. Rounding leaves about 1e-14.

    Raises:
        RuntimeError: If a network cannot take the step at all.
    """
    with _one_thread_in_float64(), tempfile.TemporaryDirectory() as folder:
        model = _plain(model, batch_size)
        with torch.no_grad():
            shape = model.generator(model.fixed_latents(2)).shape[1:]
        one = _gradients(model, shape, batch_size, 1, Path(folder))
        two = _gradients(model, shape, batch_size, _WORLD_SIZE, Path(folder))
    errors = {
        name: max(
            float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))
            for a, b in zip(one[name], two[name], strict=True)
        )
        for name in one
    }
    return [Parity(name, error) for name, error in errors.items()]


@contextmanager
def _one_thread_in_float64() -> Iterator[None]:
    """A forked process cannot use the threads of its parent: let there be none."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _plain(model: MMDGAN, batch_size: int) -> MMDGAN:
    """Copy a model in float64, with plain optimizers and latents that are shared out."""
    model = copy.deepcopy(model).cpu().double()
    model.generator_optimizer = model.critic_optimizer = _short_steps
    model.generator_scheduler = model.critic_scheduler = None
    model.generator_clip_norm = model.critic_clip_norm = model.damping = None
    model.witness_iterations = min(model.witness_iterations, _MOST_ITERATIONS)
    model.witness_overhead = None
    model.critic_steps = 1
    model.sample_latents = _SharedLatents(model.sample_latents, batch_size)
    return model


def _short_steps(parameters: Any) -> SGD:
    return SGD(parameters, lr=1e-3)


class _SharedLatents:
    """Hands each process its share of the latents that one process would draw.

    The k-th draw is a function of k. A share consists of one part of each half of the batch, so
    that halves of shares are shares of halves: the split estimator works on halves.
    """

    def __init__(self, draw: Callable[[int], Tensor], batch_size: int) -> None:
        self.draw = draw
        self.batch_size = batch_size
        self.num_draws = 0

    def __call__(self, num: int) -> Tensor:
        if num < self.batch_size:  # of the check before training
            return self._whole(num, seed=0)
        self.num_draws += 1
        whole = self._whole(_WORLD_SIZE * self.batch_size, seed=self.num_draws)
        if num == len(whole):
            return whole
        rank = torch.distributed.get_rank()
        return torch.cat([half.chunk(_WORLD_SIZE)[rank] for half in whole.chunk(2)])

    def _whole(self, num: int, seed: int) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            latents = self.draw(num)
        return latents.double() if latents.is_floating_point() else latents


class _Noise(SampleDataModule):
    """Random numbers in the shape of samples."""

    def __init__(self, sample_shape: torch.Size, num: int, batch_size: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=0)
        self.sample_shape = tuple(sample_shape)
        self.num = num

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.num, *self.sample_shape, generator=generator)
        samples = TensorSamples(noise.tanh())
        return samples, samples, samples


class _Recorder(Callback):
    """Writes every gradient that an optimizer gets, and the critic's solved weights, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vectors: dict[str, list[Tensor]] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        name = "generator" if optimizer is trainer.optimizers[0] else "critic"
        gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"]]
        self.vectors.setdefault(name, []).append(torch.cat(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        critic = pl_module.critic
        if pl_module.critic_mode == "closed_form" and isinstance(critic, LearnedKernelCritic):
            weights = critic.weights.detach().clone()
            self.vectors.setdefault("critic's solved weights", []).append(weights)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(self.vectors, self.path)


def _gradients(
    model: MMDGAN, shape: torch.Size, batch_size: int, world_size: int, folder: Path
) -> dict[str, list[Tensor]]:
    path = folder / f"{world_size}.pt"
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if world_size == 1 else f"ddp_{start}",
        precision="64-true",
        max_steps=_NUM_STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        callbacks=[_Recorder(path)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    whole = batch_size * _WORLD_SIZE
    data = _Noise(shape, whole * _NUM_STEPS, whole // world_size)
    try:
        trainer.fit(copy.deepcopy(model), datamodule=data)
    except ProcessException as error:
        raise RuntimeError(
            f"two processes cannot take a step that one process can: {str(error).strip()}"
        ) from error
    return torch.load(path, weights_only=True)


def suspicious_layers(network: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Name the layers of a network whose work on a sample depends on more than the sample.

    Found by what they do in training mode, not by their class: a layer that moves torch's random
    state draws random numbers; one without children whose output for half a batch is not half of
    its output has statistics of the batch.

    Args:
        network: It is not changed.
        inputs: Two samples or more that it takes.

    Returns:
        What is the matter, by the layer's name and class.
    """
    network, found = copy.deepcopy(network).train(), {}
    states: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        states.append(torch.get_rng_state())

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            title, state = f"{name} ({type(module).__name__})", states.pop()
            inner = any(other.startswith(f"{name}." if name else "") for other in found)
            if not torch.equal(state, torch.get_rng_state()):
                if not inner:
                    found[title] = "draws random numbers"
            elif not any(module.children()) and _mixes(module, args, output):
                found[title] = "takes statistics over the batch of its own process"

        return check

    for name, module in network.named_modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after(name))
    with torch.no_grad(), torch.random.fork_rng([]):
        network(inputs)
    return found


def _mixes(module: nn.Module, args: Any, output: Any) -> bool:
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    x, half = args[0], len(args[0]) // 2
    if half < 1 or len(output) != len(x):
        return False
    try:
        part = copy.deepcopy(module).forward(x[:half])
    except (RuntimeError, ValueError):  # it is about something else than a batch
        return False
    return not torch.allclose(part, output[:half], rtol=1e-4, atol=1e-6)
