"""What may be wrong before training: versions, devices, and gradients on several processes."""

import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.optim import SGD

from lightning_mmd.commands.versions import find_versions
from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.game import Game, Player, Processes
from lightning_mmd.gramian import largest_gramian_eigenvalue
from lightning_mmd.latents import as_inputs, select
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import seeded
from lightning_mmd.rates import max_stable_critic_lr

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
    z = as_inputs(model.fixed_latents(8))
    networks = {
        "generator": (model.generator, z),
        "critic": (model.critic, (model.sample(8, z), *z[1:])),
    }
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
    :math:`2 / (\alpha\lambda_{max}(JJ^T) + \beta)`.

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
    embedding = MeanEmbedding(critic.feature_map, model.fixed_latents(num_latents), generator)
    eigenvalue = largest_gramian_eigenvalue(embedding)
    lines = [f"largest eigenvalue of the parametric Gramian, at these weights: {eigenvalue:.3g}"]
    alpha, beta = (getattr(model.rule, name, None) for name in ("alpha", "beta"))
    if alpha is not None and beta is not None:
        bound = max_stable_critic_lr(alpha, beta, eigenvalue)
        lines.append(
            "gradient ascent on the critic's weights by plain SGD (the rule GradientAscent) is "
            f"stable below a learning rate of 2 / (alpha * {eigenvalue:.3g} + beta) = {bound:.3g}"
        )
    return lines


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

    Two updates of the model's own rule, penalties included, on real samples made of random numbers,
    in float64, by short steps of plain SGD. Nothing else of the training takes part: optimizers,
    schedules and clipping see the gradient only after it has been averaged.

    Args:
        model: Generator, critic and rule to test. It is not changed.
        batch_size: Samples of each process, even and at least 4.

    Returns:
        The largest relative error over the updates of the gradient of each network, and of the
        critic's parameters that no optimizer moves, where there are any: the weights that the
        closed form solves for. Rounding leaves about 1e-14.

    Raises:
        RuntimeError: If a network cannot take the step at all.
    """
    with _one_thread_in_float64(), tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(model).cpu().double()
        one = _play(model, batch_size, Processes())
        start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        try:
            start_processes(
                _play_beside, (model, batch_size, folder), _WORLD_SIZE, start_method=start
            )
        except ProcessException as error:
            raise RuntimeError(
                f"two processes cannot take a step that one process can: {str(error).strip()}"
            ) from error
        two = torch.load(Path(folder) / "vectors.pt", weights_only=True)
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


class _Gloo(Processes):
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def mean(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.size

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.stack(parts)


class _RecordingPlayer(Player):
    """Keeps every gradient that it is to follow."""

    def step(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        self.followed = [*getattr(self, "followed", []), gradient.detach().clone()]
        return super().step(gradient, scale)


def _play_beside(rank: int, model: MMDGAN, batch_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=_WORLD_SIZE
    )
    try:
        vectors = _play(model, batch_size, _Gloo())
        if rank == 0:
            torch.save(vectors, Path(folder) / "vectors.pt")
    finally:
        torch.distributed.destroy_process_group()


def _play(model: MMDGAN, batch_size: int, processes: Processes) -> dict[str, list[Tensor]]:
    """Play updates on a copy, and return every gradient and the parameters that none moves."""
    model = copy.deepcopy(model)
    rule = model.rule.plain()
    generator, critic = (
        _RecordingPlayer(name, network, parameters, SGD(parameters.values(), lr=1e-3))
        if parameters
        else _RecordingPlayer(name, network, parameters, None)
        for name, network, parameters in (
            ("generator", model.generator, rule.generator_parameters(model.generator)),
            ("critic", model.critic, rule.critic_parameters(model.critic)),
        )
    )
    solved = [p for n, p in model.critic.named_parameters() if n not in critic.parameters]
    left: list[Tensor] = []
    shares = _Shares(model, batch_size, processes)
    for step in range(_NUM_STEPS):
        real, draw = shares.real(step), shares.latents
        game = Game(
            generator,
            critic,
            real,
            draw,
            step=step,
            micro_batches=model.micro_batches,
            processes=processes,
            pairs=model.latents.paired,
        )
        with seeded(model.device, model.seed, processes.rank, step):
            rule.update(game)
        left.append(torch.cat([p.detach().reshape(-1) for p in solved]) if solved else Tensor())
    vectors = {"generator": generator.followed}
    if critic.parameters:
        vectors["critic"] = critic.followed
    if solved:
        vectors["critic's solved weights"] = left
    return vectors


class _Shares:
    """Hands each process its share of what one process would draw.

    A share consists of one part of each half of the batch, so that halves of shares are shares of
    halves: the estimator Split works on halves.
    """

    def __init__(self, model: MMDGAN, batch_size: int, processes: Processes) -> None:
        self._model = model
        self._num = _WORLD_SIZE * batch_size
        self._processes = processes
        self._num_draws = 0
        with torch.no_grad():
            self._shape = model.generator(*as_inputs(model.fixed_latents(2))).shape[1:]

    def latents(self, num: int) -> tuple[Tensor, ...]:
        """Return this process's share of the next latents."""
        self._num_draws += 1
        return self._share(as_inputs(self._model.fixed_latents(self._num, self._num_draws)))

    def real(self, step: int) -> tuple[Tensor, ...]:
        """Return this process's share of random numbers in the shape of samples, and labels."""
        rng = torch.Generator().manual_seed(step)
        noise = torch.randn(self._num, *self._shape, generator=rng).tanh()
        return self._share((noise, *as_inputs(self._model.fixed_latents(self._num, -1 - step))[1:]))

    def _share(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size, rank = self._processes.size, self._processes.rank
        halves = torch.arange(self._num).chunk(2)
        return select(inputs, torch.cat([half.chunk(size)[rank] for half in halves]))


def suspicious_layers(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Name the layers of a network whose work on a sample depends on more than the sample.

    Found by what they do in training mode, not by their class: a layer that moves torch's random
    state draws random numbers; one without children whose output for half a batch is not half of
    its output has statistics of the batch.

    Args:
        network: It is not changed.
        inputs: What it takes, for two samples or more.

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
        network(*inputs)
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
