"""What a generator is called with: checks, dtypes, labels."""

import pytest
import torch

from lightning_mmd import BatchParts, Latents


def test_a_length_draws_standard_normal_vectors_of_the_dtype():
    torch.manual_seed(3)
    (z,) = Latents(5)(4, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(z, torch.randn(4, 5, dtype=torch.float32))


class Uniform(Latents):
    """A draw of one's own by a class."""

    def __init__(self):
        super().__init__(3)

    def draw(self, num):
        return torch.rand(num, 3), torch.arange(num)


@pytest.mark.parametrize("latents", [Uniform(), Latents(Uniform().draw)])
def test_draws_of_ones_own_are_moved_to_the_dtype_and_labels_are_not(latents):
    z, labels = latents(6, torch.float32)
    assert z.dtype == torch.float32
    assert labels.tolist() == list(range(6))
    assert 0 <= z.min() < z.max() <= 1
    assert Latents.of(latents) is latents


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (0, ValueError, "positive length, got 0"),
        (-3, ValueError, "positive length, got -3"),
        (3.5, TypeError, "got 3.5"),
        (True, TypeError, "got True"),
        ("32", TypeError, "got '32'"),
    ],
)
def test_lengths_are_checked(source, error, message):
    with pytest.raises(error, match=message):
        Latents(source)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda n: torch.zeros(3, 2), ValueError, r"must have 4 rows, got shape \(3, 2\)"),
        (lambda n: torch.tensor(1.0), ValueError, r"got shape \(\)"),
        (lambda n: torch.zeros(n, 2).numpy(), TypeError, "got ndarray. Convert it: torch.as_t"),
        (lambda n: (torch.zeros(n, 2), [1] * n), TypeError, "got list"),
    ],
)
def test_draws_are_checked(draw, error, message):
    with pytest.raises(error, match=message):
        Latents(draw)(4)


def test_parts_of_a_batch_are_found():
    x, y = torch.randn(4, 2), torch.arange(4)
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        parts = BatchParts("x", "y") if isinstance(batch, dict) else BatchParts()
        assert [part is expected for part, expected in zip(parts.read(batch), (x, y), strict=True)]
    assert BatchParts().read(x) == (x,)
    assert BatchParts(labels=None).read((x, y)) == (x,)
    assert BatchParts(samples=1, labels=0).read((y, x))[1] is y
    with pytest.raises(TypeError, match=r"keys \['a'\], and none of them is 0"):
        BatchParts().read({"a": x})
    with pytest.raises(TypeError, match=r"got torch.int64. Convert"):
        BatchParts().read(y)
