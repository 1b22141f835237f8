import math
import pickle
from itertools import zip_longest

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_mmd.kernels import Gaussian, RationalQuadratic, SumKernel
from lightning_mmd.metrics import MaximumMeanDiscrepancy
from lightning_mmd.mmd import mmd2_biased, mmd2_unbiased, mmd2_with_error

KERNEL = SumKernel([RationalQuadratic(0.5, bandwidth=2.0), Gaussian(bandwidth=1.5)])


def draw(num, *shape, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *shape, generator=generator, dtype=torch.float64) + shift


def stream(metric, x, y, sizes_x, sizes_y):
    """Update both sides alternately; each side keeps its order."""
    for pair in zip_longest(x.split(sizes_x), y.split(sizes_y)):
        for batch, real in zip(pair, (True, False), strict=True):
            if batch is not None:
                metric.update(batch, real=real)
    return metric


@pytest.mark.parametrize("unbiased", [True, False])
def test_streamed_value_is_that_of_the_concatenation(unbiased):
    x, y = draw(23, 2, 3), draw(17, 2, 3, seed=1, shift=0.4)
    metric = MaximumMeanDiscrepancy(KERNEL, unbiased=unbiased, block_size=7)
    value = stream(metric, x, y, [10, 1, 12], [2, 15]).compute()
    estimator = mmd2_unbiased if unbiased else mmd2_biased
    expected = estimator(x, y, KERNEL)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_standard_error_comes_with_the_value_on_request():
    x, y = draw(9, 4), draw(7, 4, seed=1, shift=0.5)
    metric = MaximumMeanDiscrepancy(Gaussian(2.0), with_error=True)
    stream(metric, x, y, (4, 5), (7,))
    expected = mmd2_with_error(x, y, Gaussian(2.0))
    assert metric.compute() == {"mmd2": expected.value, "mmd2_error": expected.std_error}
    with pytest.raises(ValueError, match="standard error is that of the U-statistic"):
        MaximumMeanDiscrepancy(Gaussian(2.0), unbiased=False, with_error=True)


def test_value_of_a_hand_calculation():
    kernel = Gaussian(bandwidth=1.0)
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    # k at distances 1, 2: within x, within y, and the four pairs 0, 2, 1, 1.
    near, far = math.exp(-0.5), math.exp(-2.0)
    unbiased = stream(MaximumMeanDiscrepancy(kernel), x, y, 1, 1).compute()
    biased = stream(MaximumMeanDiscrepancy(kernel, unbiased=False), x, y, 1, 1).compute()
    assert unbiased.item() == pytest.approx(near + far - (1 + far + 2 * near) / 2, abs=1e-6)
    expected = (2 + 2 * near) / 4 + (2 + 2 * far) / 4 - (1 + far + 2 * near) / 2
    assert biased.item() == pytest.approx(expected, abs=1e-6)


class Embedding(nn.Module):
    """A net whose training mode would change the embedding."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x.flatten(1)))


def test_features_embed_frozen_and_in_evaluation_mode():
    torch.manual_seed(0)
    features = Embedding().train()
    weight, bias = features.linear.weight.detach().clone(), features.linear.bias.detach().clone()
    metric = MaximumMeanDiscrepancy(KERNEL, features=features)
    with torch.no_grad():
        features.linear.weight.mul_(3.0)  # training the original moves nothing
    x, y = draw(12, 2, 3), draw(9, 2, 3, seed=1, shift=0.5)
    x.requires_grad_()
    value = stream(metric, x, y, 5, 4).compute()
    embed = [s.detach().flatten(1) @ weight.T + bias for s in (x, y)]
    assert value.item() == pytest.approx(mmd2_unbiased(*embed, KERNEL).item(), rel=1e-12)
    assert not value.requires_grad
    assert features.training
    assert features.linear.weight.requires_grad


def test_features_do_not_enter_the_owner():
    owner = nn.Module()
    owner.metric = MaximumMeanDiscrepancy(KERNEL, features=Embedding())
    owner.metric.update(draw(3, 6), real=True)
    assert owner.state_dict() == {}
    assert list(owner.parameters()) == []
    owner.train()
    stream(owner.metric, draw(3, 6), draw(4, 6), 3, 4)
    first = owner.metric.compute()  # dropout would differ between two evaluations
    again = MaximumMeanDiscrepancy(KERNEL)
    net = owner.metric._features[0]
    again.update(net(torch.cat([draw(3, 6)] * 2)), real=True)
    again.update(net(draw(4, 6)), real=False)
    assert first.item() == pytest.approx(again.compute().item(), rel=1e-12)  # but for rounding


def test_half_precision_is_computed_in_single():
    x, y = draw(8, 3).half(), draw(8, 3, seed=1).half()
    value = stream(MaximumMeanDiscrepancy(KERNEL), x, y, 3, 3).compute()
    expected = mmd2_unbiased(x.double(), y.double(), KERNEL).item()
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_reset_keeps_the_real_side_on_request():
    x, y, other = draw(6, 3), draw(5, 3, seed=1), draw(7, 3, seed=2, shift=1.0)
    metric = MaximumMeanDiscrepancy(KERNEL, reset_real_samples=False)
    first = stream(metric, x, y, 2, 2).compute()
    metric.reset()
    metric.update(other, real=False)
    assert metric.compute() == mmd2_unbiased(x, other, KERNEL)
    assert metric.compute() != first
    metric = MaximumMeanDiscrepancy(KERNEL)
    stream(metric, x, y, 2, 2).reset()
    metric.update(other, real=False)
    with pytest.raises(ValueError, match="n = 0 real and m = 7 fake"):
        metric.compute()


def test_clone_and_pickle_carry_samples_and_features():
    metric = MaximumMeanDiscrepancy(KERNEL, features=Embedding())
    metric.update(draw(6, 6), real=True)
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.update(draw(5, 6, seed=1), real=False)
    for copy in copies:
        copy.update(draw(5, 6, seed=1), real=False)
        assert copy.compute() == metric.compute()
    copies[0].update(draw(5, 6, seed=3, shift=2.0), real=False)
    assert copies[0].compute() != metric.compute()


def test_bad_samples_are_refused():
    metric = MaximumMeanDiscrepancy(KERNEL)
    with pytest.raises(TypeError, match=r"torch.uint8. Scale"):
        metric.update(torch.zeros(2, 3, dtype=torch.uint8), real=True)
    metric.update(draw(2, 3), real=True)
    with pytest.raises(ValueError, match=r"got \(4,\) after \(3,\)"):
        metric.update(draw(2, 4), real=False)
    metric.update(draw(1, 3), real=False)
    with pytest.raises(ValueError, match="at least 2 samples on each side, got n = 2 real and m"):
        metric.compute()
    biased = MaximumMeanDiscrepancy(KERNEL, unbiased=False)
    stream(biased, draw(1, 3), draw(1, 3, seed=1), 1, 1)
    assert biased.compute() == mmd2_biased(draw(1, 3), draw(1, 3, seed=1), KERNEL)


def measure_on_one_rank(rank, path, parts_x, parts_y, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    metric = MaximumMeanDiscrepancy(KERNEL, reset_real_samples=False)
    stream(metric, parts_x[rank], parts_y[rank], 4, 3)
    value = metric.compute()
    metric.reset()  # the synchronised state must not have replaced this rank's own
    metric.update(parts_y[rank], real=False)
    results[rank, 0], results[rank, 1] = value, metric.compute()
    dist.destroy_process_group()


def test_what_is_no_kernel_is_refused_at_once():
    with pytest.raises(TypeError, match=r"needs a kernel such as Gaussian.*got 'rbf'"):
        MaximumMeanDiscrepancy("rbf")


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_two_processes_equal_one(tmp_path):
    x, y = draw(19, 2, 3), draw(11, 2, 3, seed=1, shift=0.3)
    parts_x, parts_y = (x[:13], x[13:]), (y, y[:0])  # unequal shares, one of them empty
    results = torch.zeros(2, 2, dtype=torch.float64).share_memory_()
    arguments = (tmp_path / "init", parts_x, parts_y, results)
    mp.start_processes(measure_on_one_rank, arguments, nprocs=2, start_method="fork")
    single = stream(MaximumMeanDiscrepancy(KERNEL), x, y, 5, 5)
    assert results.tolist() == [[single.compute().item()] * 2] * 2
