"""Two processes against one on the concatenated batch: the same mathematics."""

import copy
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny import gan
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    NoiseInjection,
)
from lightning_mmd.data import SampleDataModule, TensorSamples
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.noise import AdaptiveNoise, ConstantNoise
from lightning_mmd.passes import seeded
from lightning_mmd.processes import together

NUM_STEPS, BATCH = 6, 8


class WholeBatch(MMDGAN):
    """One process that draws what two processes draw between them."""

    draws = 0

    def training_step(self, batch, batch_idx):
        self.draws = 0
        super().training_step(batch, batch_idx)

    def sample_latents(self, num):
        if self._trainer is None or num != 2 * BATCH:
            return super().sample_latents(num)
        self.draws += 1
        parts = []
        for rank in range(2):
            with seeded(self.device, self.seed, rank, self.critic_step):
                parts.append([torch.randn(BATCH, 3) for _ in range(self.draws)][-1])
        return torch.cat(parts)


class Points(SampleDataModule):
    """64 points; each rank reads its share of every epoch."""

    sample_shape = (2,)

    def load(self):
        points = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
        return TensorSamples(points), TensorSamples(points), TensorSamples(points)


def make_model(kind, **kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 12, (16,)), 12)
    return gan(MLPGenerator(2, 3, (16,)), critic, kind=kind, latents=3, beta=0.1, **kwargs)


def fit(model, path, devices, strategy="auto", callbacks=(), num_nodes=1):
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        max_steps=NUM_STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    trainer.fit(model, datamodule=Points(BATCH * (2 // devices // num_nodes), 0, seed=0))
    trainer.save_checkpoint(path / f"{devices}.ckpt", weights_only=True)
    if num_nodes > 1:  # the first node alone writes
        return {}
    return torch.load(path / f"{devices}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rule": ClosedForm},
        {"rule": GradientAscent, "alpha": 5.0},
        {"rule": GradientAscent, "alpha": 5.0, "estimator": Lagged()},
    ],
    ids=["closed form", "adversarial", "lagged"],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_two_processes_train_as_one(kwargs, micro_batches, tmp_path):
    one = make_model(WholeBatch, **kwargs)
    start = copy.deepcopy(one.state_dict())
    whole = fit(one, tmp_path, devices=1)
    several = make_model(MMDGAN, micro_batches=micro_batches, **kwargs)
    parts = fit(several, tmp_path, devices=2, strategy="ddp_fork")
    size = nn.utils.parameters_to_vector([whole[n] - start[n] for n in whole]).norm()
    assert size > 0.05  # they moved
    for name, value in whole.items():
        assert (value - parts[name]).norm() < 1e-9 * size, name


class WholeNoise(NoiseInjection):
    """One process that draws the noise of two."""

    def _draw(self, x):
        num_draws, parts = self._draws if self._drawn_at == self.updates else 0, []
        for self._rank, part in enumerate(x.chunk(2)):
            self._draws = num_draws
            parts.append(super()._draw(part))
        return torch.cat(parts)


@pytest.mark.parametrize("rule", [ClosedForm, GradientAscent])
@pytest.mark.parametrize(
    "schedule", [ConstantNoise(0.5), AdaptiveNoise(largest=1.0)], ids=["constant", "adaptive"]
)
def test_noise_is_injected_into_two_processes_as_into_one(rule, schedule, tmp_path):
    model = make_model(WholeBatch, rule=rule)
    start = copy.deepcopy(model.state_dict())
    whole = fit(model, tmp_path / "one", devices=1, callbacks=[WholeNoise(schedule)])
    noise = NoiseInjection(schedule)
    several = make_model(MMDGAN, rule=rule)
    parts = fit(several, tmp_path / "two", 2, "ddp_fork", callbacks=[noise])
    plain = fit(make_model(WholeBatch, rule=rule), tmp_path / "plain", devices=1)
    size = nn.utils.parameters_to_vector([whole[n] - start[n] for n in whole]).norm()
    noisy = nn.utils.parameters_to_vector([whole[n] - plain[n] for n in whole]).norm()
    assert noisy > 1e-3 * size  # it did something
    for name, value in whole.items():
        assert (value - parts[name]).norm() < 1e-9 * size, name


def load_parity():
    """Import the benchmark, which is no package."""
    path = Path(__file__).parent.parent / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module
    spec.loader.exec_module(module)
    return module


parity = load_parity()
BY_NAME = {case.name: case for case in parity.CASES}


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_gradients_of_two_processes_are_those_of_one(case, tmp_path):
    torch.set_default_dtype(torch.float32)
    ((_, error),) = parity.errors(case, [2], torch.float64, tmp_path)
    if case.promised:
        assert error < 1e-12
    else:
        assert 0.02 < error < 0.5


@pytest.mark.parametrize("name", ["penalty, forward", "witness features"])
def test_gradients_of_four_processes_in_single_precision(name, tmp_path):
    torch.set_default_dtype(torch.float32)
    ((_, error),) = parity.errors(BY_NAME[name], [4], torch.float32, tmp_path)
    assert error < 1e-5


STRATEGIES = {
    "find_unused_parameters": lambda: DDPStrategy(start_method="fork", find_unused_parameters=True),
    "static_graph": lambda: DDPStrategy(start_method="fork", static_graph=True),
    "bucket view": lambda: DDPStrategy(start_method="fork", gradient_as_bucket_view=True),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kwargs", [{}, {"rule": GradientAscent}], ids=["closed", "gradient"])
def test_other_flags_of_ddp_give_the_same_steps(strategy, kwargs, tmp_path):
    plain = fit(make_model(MMDGAN, **kwargs), tmp_path, devices=2, strategy="ddp_fork")
    other = fit(make_model(MMDGAN, **kwargs), tmp_path, devices=2, strategy=STRATEGIES[strategy]())
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name


class Drifts(MMDGAN):
    """A model that one process moves by one unit in the last place."""

    def on_train_batch_end(self, *_):
        if self.global_rank == 1:
            bias = self.generator.layers[0].bias.data
            bias[3] = torch.nextafter(bias[3], bias.new_tensor(1e9))


def test_processes_that_drift_apart_are_found_at_a_checkpoint(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    message = (
        r"2 processes hold different parameters \(1 of 9, the first is generator\.layers\.0\.bias"
    )
    with pytest.raises(ProcessRaisedException, match=message):
        fit(make_model(Drifts), tmp_path, 2, "ddp_fork", [checkpoints])
    assert not list(tmp_path.glob("*.ckpt"))


NODE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from test_distributed import MMDGAN, fit, make_model
fit(make_model(MMDGAN), Path(sys.argv[2]), devices=1, strategy="ddp", num_nodes=2)
"""


def test_two_nodes_train_as_two_processes(tmp_path):
    """Two one-process nodes on loopback, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        torchrun = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        torchrun |= {"MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        torchrun |= {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0}
        environment = os.environ | {name: str(value) for name, value in torchrun.items()}
        command = [sys.executable, "-c", NODE, str(Path(__file__).parent), tmp_path / str(rank)]
        nodes.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent))
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    here = fit(make_model(MMDGAN), tmp_path, devices=2, strategy="ddp_fork")
    nodes = torch.load(tmp_path / "0" / "1.ckpt", weights_only=True)["state_dict"]
    for name, value in here.items():
        assert torch.equal(value, nodes[name]), name


class NaNOnOneRank(MMDGAN):
    """A model that one process hands a batch with NaN."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            batch = torch.full_like(batch, torch.nan)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("rule", [ClosedForm, GradientAscent])
def test_a_batch_with_nan_on_one_process_stops_all_with_one_message(rule, tmp_path):
    """No process waits for a collective that another one left."""
    model = make_model(NaNOnOneRank, rule=rule)
    with pytest.raises(ProcessRaisedException, match="real data holds NaN or infinite"):
        fit(model, tmp_path, 2, "ddp_fork")


class FailsOnOneRank(Callback):
    """Reads something on each process; one cannot, the other would wait in the next collective."""

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank

    def on_train_start(self, trainer, pl_module):
        try:
            with together(trainer):
                if trainer.global_rank == self.rank:
                    raise OSError("a file of rank's own")
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            (self.folder / f"told{trainer.global_rank}").write_text(told)
            raise
        trainer.strategy.barrier()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_process_stops_all(rank, tmp_path):
    with pytest.raises(ProcessRaisedException, match=r"a file of rank's own|another process"):
        fit(make_model(MMDGAN), tmp_path, 2, "ddp_fork", [FailsOnOneRank(tmp_path, rank)])
    told = {r: (tmp_path / f"told{r}").read_text() for r in range(2)}
    assert told[rank] == "OSError: a file of rank's own"
    assert told[1 - rank] == "RuntimeError: another process has failed; its error says why."
