"""Rates that a callback scales stay scaled, whatever scheduler there is."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_mmd.callbacks.learning_rates import scale_learning_rates

SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=6),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 40),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 12), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Trainer:
    """What `scale_learning_rates` reads of a trainer."""

    class Config:
        def __init__(self, scheduler):
            self.scheduler = scheduler

    def __init__(self, optimizer, scheduler):
        self.optimizers, self.lr_scheduler_configs = [optimizer], [self.Config(scheduler)]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("when", [0, 8])
def test_all_later_rates_are_halved(name, when):
    def rates(scale_at):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.08, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        found = []
        for step in range(20):
            if step == scale_at:
                scale_learning_rates(Trainer(optimizer, scheduler), 0.5)
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    plain, halved = rates(None), rates(when)
    factors = [1.0 if step < when else 0.5 for step in range(20)]
    expected = [rate * factor for rate, factor in zip(plain, factors, strict=True)]
    assert halved == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_rates_that_are_tensors_change_in_place():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(
        [nn.Parameter(torch.zeros(1))], lr=rate, foreach=True, capturable=True
    )
    found = scale_learning_rates(Trainer(optimizer, lr_scheduler.StepLR(optimizer, 5)), 0.5)
    assert found == [pytest.approx(0.05)]
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_reduce_on_plateau_goes_on_from_the_smaller_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.08)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    assert scale_learning_rates(Trainer(optimizer, scheduler), 0.5) == [0.04]
    for _ in range(2):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.004)
