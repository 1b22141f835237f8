"""Another preconditioner of the gap in one file: a ridge that weighs features apart."""

from dataclasses import dataclass

import torch

from lightning_mmd import Image, ParametricGramian


@dataclass
class Ridge(ParametricGramian):
    """A = alpha J J^T + beta diag(1, 2, ..., r) / r."""

    power: float = 1.0

    def apply(self, embedding, p, alpha, beta):
        image = super().apply(embedding, p, alpha, 0.0)
        ridge = (torch.arange(1, len(p) + 1).to(p) / len(p)) ** self.power
        return Image(
            image.value + beta * ridge * p,
            image.energy + beta * (ridge * p * p).sum(),
            image.parametric_gradient,
            image.tangents,
            image.gramian_image,
        )
