"""The monitor measures what it says, changes nothing unless asked to, and resumes exactly."""

import csv
import dataclasses
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from tiny import gan
from torch.utils.data import DataLoader

from lightning_mmd import (
    ConvergenceMonitor,
    Gaussian,
    GradientAscent,
    LearnedKernelCritic,
    mmd2_unbiased,
)
from lightning_mmd.module import DivergedError
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.verdicts import VERDICTS, Verdict

KERNEL = Gaussian(1.0)


def model(**kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 8, (8,)), 8)
    defaults = {"latents": 3, "rule": GradientAscent}
    return gan(MLPGenerator(2, 3, (8,)), critic, **(defaults | kwargs))


def data(num=40):
    torch.manual_seed(1)
    return DataLoader(torch.randn(num, 2) + 1.0, batch_size=num)


def trainer(max_steps, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": -1}
    return Trainer(max_steps=max_steps, callbacks=[*callbacks], **quiet)


class States(Callback):
    """Copies of the module before and after every batch."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def test_traces_are_what_they_say():
    states, drawn = States(), []
    monitor = ConvergenceMonitor(every_n_steps=3, kernel=KERNEL, num_samples=20)
    module, loader = model(critic_steps=2), data()
    sample = module.sample
    module.sample = lambda num, z: drawn.append(z) or sample(num, z)
    trainer(6, states, monitor).fit(module, loader)
    traces = monitor.traces
    assert traces.steps == [0, 3, 6]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
    real = loader.dataset[order]
    now, twin = drawn[-2], drawn[-1]  # latents of the newest level, and of its update
    assert not torch.equal(now, twin)
    old, new = model(critic_steps=2), model(critic_steps=2)
    old.load_state_dict(states.before[11])
    new.load_state_dict(states.after[11])
    with torch.no_grad():
        level = mmd2_unbiased(real, new.generator(now), KERNEL).item()
        moved = [mmd2_unbiased(real, net.generator(twin), KERNEL).item() for net in (old, new)]
        points = torch.cat([real, old.generator(twin)])
        a, b = old.critic(points), new.critic(points)
        spread = torch.pdist(new.generator(now)).mean() / torch.pdist(real).mean()
        scale = new.critic(torch.cat([real, new.generator(now)])).std()
    assert traces.mmd2[-1] == pytest.approx(level, rel=1e-9)
    assert traces.descent[-1] == pytest.approx(moved[1] - moved[0], rel=1e-6)
    assert traces.critic_change[-1] == pytest.approx(float((b - a).std() / (a.std() + b.std())))
    assert traces.diversity[-1] == pytest.approx(float(spread))
    assert traces.critic_scale[-1] == pytest.approx(float(scale))
    assert math.isnan(traces.descent[0])
    assert traces.gradient_norm[-1] > 0
    theta = [
        torch.cat([v.flatten() for k, v in s.items() if k[:9] == "generator"])
        for s in (states.before[0], states.after[11])
    ]
    direction = torch.randn(len(theta[0]), generator=torch.Generator().manual_seed(0))
    step = (theta[1] - theta[0]) @ (direction / direction.norm())
    assert traces.projection[-1] - traces.projection[0] == pytest.approx(float(step), rel=1e-6)


def test_the_floor_is_a_quantile_of_mmd2_between_data():
    monitor = ConvergenceMonitor(kernel=KERNEL, num_samples=60)
    trainer(1, monitor).fit(model(), data(60))
    torch.manual_seed(5)
    null = [mmd2_unbiased(torch.randn(60, 2), torch.randn(60, 2), KERNEL) for _ in range(300)]
    exceeding = sum(value > monitor.floor for value in null) / 300
    assert 0.0 <= exceeding < 0.06
    assert sum(value > monitor.floor / 3 for value in null) / 300 > 0.05


def test_training_is_the_same_with_and_without_and_resumes_exactly(tmp_path):
    def run(steps, *callbacks, **kwargs):
        network, running = model(), trainer(steps, *callbacks)
        running.fit(network, data(), **kwargs)
        return network, running

    plain, _ = run(8)
    whole, half, resumed = (ConvergenceMonitor(every_n_steps=2, num_samples=20) for _ in "abc")
    watched, _ = run(8, whole)
    run(4, half)[1].save_checkpoint(tmp_path / "half.ckpt")
    again, _ = run(8, resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for a, b, c in zip(*(m.parameters() for m in (plain, watched, again)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert repr(dataclasses.asdict(resumed.traces)) == repr(dataclasses.asdict(whole.traces))
    assert whole.traces.steps == [0, 2, 4, 6, 8]


def test_a_diverged_run_gets_a_verdict():
    sgd = torch.optim.SGD
    monitor, module = ConvergenceMonitor(), model(critic_optimizer=lambda p: sgd(p, lr=1e200))
    with pytest.raises(DivergedError, match="training has diverged"):
        trainer(9, monitor).fit(module, data())
    assert monitor.verdict.name == "critic too strong"
    assert "not finite" in monitor.verdict.reason


@pytest.mark.parametrize("act", [False, True])
def test_it_acts_on_a_collapse_only_when_asked_to(act, monkeypatch):
    collapsed = Verdict("collapsed", "made", "made")
    monkeypatch.setattr("lightning_mmd.callbacks.convergence.judge", lambda *_: collapsed)
    monitor = ConvergenceMonitor(every_n_steps=1, num_samples=10, act=act)
    running = trainer(30, monitor)
    running.fit(model(), data())
    share = 0.25 if act else 1.0  # at the first and the twenty-first of 31 observations
    rates = [optimizer.param_groups[0]["lr"] for optimizer in running.optimizers]
    assert rates == pytest.approx([5e-4 * share, 1e-3 * share])


def test_the_verdict_is_logged_by_number(tmp_path):
    monitor = ConvergenceMonitor(every_n_steps=2, num_samples=10)
    running = trainer(4, monitor)
    running.loggers = [CSVLogger(tmp_path)]
    running.fit(model(), data())
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("convergence/mmd2")]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert {float(row["convergence/verdict"]) for row in rows} == {VERDICTS.index("undecided")}


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"'netD'.*MMDGAN has no.*generator \(MLPGenerator\)"):
        trainer(1, ConvergenceMonitor(critic="netD")).fit(model(), data())
    with pytest.raises(ValueError, match="at least 10, got 9"):
        ConvergenceMonitor(num_samples=9)
    with pytest.raises(ValueError, match="at least 10 training images, got 8"):
        trainer(1, ConvergenceMonitor()).fit(model(), data(8))
    monitor = ConvergenceMonitor(critic=None, num_samples=10)
    trainer(5, monitor).fit(model(), data())
    assert all(math.isnan(value) for value in monitor.traces.critic_change)
