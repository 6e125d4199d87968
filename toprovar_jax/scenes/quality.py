"""How far two sets of pictures lie apart as wholes: the Frechet distance of their features."""

import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Float

#: What has to be said wherever the distance of the judge's features is shown.
JUDGE_FID = "judge-FID: judge features, not Inception; not comparable with published FID"


def frechet_distance(a: Float[np.ndarray, "_ F"], b: Float[np.ndarray, "_ _"]) -> float:
    """Frechet distance of two sets of features, each taken for a normal distribution.

    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Heusel et al., "GANs trained by a two time-scale update rule
    converge to a local Nash equilibrium", 2017), covariances divided by N - 1, in float64. The trace of the root is the
    sum of the roots of the eigenvalues of ``S_a^(1/2) S_b S_a^(1/2)``, which is symmetric and has those of ``S_a S_b``:
    so nothing is lost where the covariances are singular, as they are with fewer pictures than features. Few pictures
    make the distance too large: compare only distances of equally many.

    Args:
      a, b: a row of features per picture.

    Raises:
      UserInputError: features of different lengths, or fewer than two pictures.
    """
    if a.shape[1] != b.shape[1]:
        raise UserInputError(
            f"features of lengths {a.shape[1]} and {b.shape[1]}", "must be of one kind", "compute both with one network"
        )
    if min(len(a), len(b)) < 2:
        raise UserInputError(
            f"{min(len(a), len(b))} pictures", "must be at least 2 for a Frechet distance", "give more"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    root = _square_root(first)
    eigenvalues = np.linalg.eigvalsh(root @ second @ root)
    mixed = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    apart = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return max(0.0, float(apart + np.trace(first) + np.trace(second) - 2.0 * mixed))


def _square_root(matrix: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F F"]:
    """Of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
