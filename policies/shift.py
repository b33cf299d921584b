"""Representation shift: how far a trace lies from a reference in the target's hidden states.

Source: "Efficiently aligning draft models via parameter- and data-efficient adaptation" (reference/papers.md, paper 4): PCA
of the target's hidden states fitted on a reference, Mahalanobis distance of each answer token to the reference's mean, and
the rho-quantile over the tokens as the score of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Added to every variance, relative to the mean of all: directions that the reference hardly uses stay finite.
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class RepresentationShift:
    """A fitted reference; make it with `fit`."""

    #: [H]
    mean: FloatArray
    #: [H, D] orthonormal principal directions.
    directions: FloatArray
    #: [D] variance along each.
    variances: FloatArray

    @classmethod
    def fit(cls, states: npt.ArrayLike, components: int) -> RepresentationShift:
        """Fit mean and principal directions.

        Args:
          states: [N, H] hidden states of the reference's tokens, N at least 2.
          components: directions kept, D; no more than min(N, H) are.

        Raises: ValueError: fewer than two states, or components below 1.
        """
        values = np.asarray(states, np.float64)
        if values.ndim != 2 or len(values) < 2:
            raise ValueError(f"states {values.shape} must be [N, H] with at least two rows")
        if components < 1:
            raise ValueError(f"components ({components}) must be at least 1")
        mean = values.mean(0)
        covariance = np.cov(values - mean, rowvar=False).reshape(values.shape[1], values.shape[1])
        variances, directions = np.linalg.eigh(covariance)
        kept = np.argsort(variances)[::-1][: min(components, *values.shape)]
        variances = np.maximum(variances[kept], 0.0)
        return cls(mean, directions[:, kept], variances + _RIDGE * max(float(variances.mean()), 1e-12))

    def distances(self, states: npt.ArrayLike) -> FloatArray:
        """Mahalanobis distance of each token, [R], from states [R, H].

        Raises: ValueError: another width than the reference's.
        """
        values = np.asarray(states, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ValueError(f"states {values.shape} must be [R, {len(self.mean)}], as the reference's")
        found: FloatArray = np.sqrt((((values - self.mean) @ self.directions) ** 2 / self.variances).sum(1))
        return found

    def score(self, states: npt.ArrayLike, rho: float) -> float:
        """The rho-quantile of the distances; high: unlike the reference.

        Raises: ValueError: no states, or rho outside [0, 1].
        """
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho ({rho}) must lie within [0, 1]")
        found = self.distances(states)
        if not found.size:
            raise ValueError("states (none) must hold at least one token")
        return float(np.quantile(found, rho))
