"""Projections of hidden states on the teacher's side, so that few numbers travel per position.

Both kinds have orthonormal columns, so lengths and angles survive as far as the width allows. The
student learns its own map onto the projected states; nothing is ever projected back.

N positions   D hidden width   E shipped width
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file

from shared.errors import ConfigError
from shared.files import obey_umask

Projections = Mapping[int, np.ndarray]  # teacher layer -> [D, E] float32


def fit_pca(moment_DD: np.ndarray, width: int) -> np.ndarray:
    """The E directions that keep most of the states' squared length [D, E], from the sum of
    h h^T over a sample (PCA, not centred: the student's map onto them has no bias)."""
    _, directions_DD = np.linalg.eigh(moment_DD)
    leading_DE = directions_DD[:, ::-1][:, :width]
    largest_E = np.abs(leading_DE).argmax(axis=0)
    signs_E = np.sign(leading_DE[largest_E, np.arange(leading_DE.shape[1])])
    return np.ascontiguousarray(leading_DE * signs_E, np.float32)


def random_projection(hidden_width: int, width: int, *, seed: int) -> np.ndarray:
    """A random subspace [D, E], the same for the same arguments."""
    noise_DE = np.random.default_rng(seed).standard_normal((hidden_width, width))
    basis_DE, upper_EE = np.linalg.qr(noise_DE)
    return np.ascontiguousarray(basis_DE * np.sign(np.diag(upper_EE)), np.float32)


def save_projections(cache: str | Path, projections: Projections) -> str:
    """Keep matrices in a cache; returns their digest, by which they are found again."""
    digest = _digest(projections)
    path = _path(cache, digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.with_suffix(".part")
        save_file({str(layer): matrix for layer, matrix in projections.items()}, torn)
        obey_umask(torn)
        torn.replace(path)
    return digest


def load_projections(cache: str | Path | None, digest: str) -> dict[int, np.ndarray]:
    """The matrices of a digest. Raises ConfigError where the cache lacks or garbles them."""
    path = None if cache is None else _path(cache, digest)
    if path is None or not path.exists():
        raise ConfigError(
            f"the teacher has no projection {digest} in its cache {cache}; start the teacher "
            "service with the run's paths.cache"
        )
    found = {int(layer): matrix for layer, matrix in load_file(path).items()}
    if _digest(found) != digest:
        raise ConfigError(f"{path} is damaged; remove it and run the same command again")
    return found


def _path(cache: str | Path, digest: str) -> Path:
    return Path(cache).expanduser() / "projections" / f"{digest}.safetensors"


def _digest(projections: Projections) -> str:
    state = xxhash.xxh3_128()
    for layer, matrix in sorted(projections.items()):
        state.update(f"{layer} {matrix.shape} {matrix.dtype.str}".encode())
        state.update(np.ascontiguousarray(matrix).tobytes())
    return state.hexdigest()
