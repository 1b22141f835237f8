"""A kernel in one file: the Cauchy kernel."""

from dataclasses import dataclass

from lightning_mmd.kernels import StationaryKernel


@dataclass(frozen=True)
class Cauchy(StationaryKernel):
    """1 / (1 + ||x - y||^2 / bandwidth^2)."""

    bandwidth: float = 1.0

    def _profile(self, squared_distances):
        return 1 / (1 + squared_distances / self.bandwidth**2)

    def sample_frequencies(self, num, dim, generator):
        raise TypeError("Cauchy draws no frequencies.")
