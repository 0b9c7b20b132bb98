"""Projections: orthonormal, reproducible, the best of their width, and never mistaken."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.errors import ConfigError
from teacher_service.scoring.projection import (
    fit_pca,
    load_projections,
    random_projection,
    save_projections,
)

STATES_ND = np.random.default_rng(0).standard_normal((200, 24)) * np.linspace(3, 0.1, 24)
MOMENT_DD = STATES_ND.T @ STATES_ND


def lost(matrix_DE: np.ndarray) -> float:
    """Squared length of the states outside the columns' span."""
    return float(np.square(STATES_ND - STATES_ND @ matrix_DE @ matrix_DE.T).sum())


@pytest.mark.parametrize("matrix_DE", [fit_pca(MOMENT_DD, 7), random_projection(24, 7, seed=3)])
def test_columns_are_orthonormal(matrix_DE):
    assert matrix_DE.dtype == np.float32
    np.testing.assert_allclose(matrix_DE.T @ matrix_DE, np.eye(7), atol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 23])
def test_a_pca_loses_what_the_smaller_singular_values_hold(width):
    singular = np.linalg.svd(STATES_ND, compute_uv=False)
    expected = float(np.square(singular[width:]).sum())
    assert lost(fit_pca(MOMENT_DD, width)) == pytest.approx(expected, rel=1e-4)
    assert lost(random_projection(24, width, seed=0)) > expected


def test_a_full_width_keeps_every_distance():
    matrix_DD = fit_pca(MOMENT_DD, 24)
    np.testing.assert_allclose(
        np.linalg.norm(STATES_ND @ matrix_DD, axis=1), np.linalg.norm(STATES_ND, axis=1), rtol=1e-5
    )


def test_random_projections_are_a_function_of_their_seed():
    assert np.array_equal(random_projection(24, 7, seed=3), random_projection(24, 7, seed=3))
    assert not np.array_equal(random_projection(24, 7, seed=3), random_projection(24, 7, seed=4))


def test_what_is_saved_is_found_by_its_digest(tmp_path):
    saved = {2: fit_pca(MOMENT_DD, 7), 4: random_projection(24, 7, seed=1)}
    found = load_projections(tmp_path, save_projections(tmp_path, saved))
    assert found.keys() == saved.keys()
    for layer, matrix in saved.items():
        np.testing.assert_array_equal(found[layer], matrix)


def test_a_damaged_or_absent_file_is_refused(tmp_path):
    digest = save_projections(tmp_path, {2: fit_pca(MOMENT_DD, 7)})
    (path,) = (tmp_path / "projections").iterdir()
    save_file({"2": fit_pca(MOMENT_DD, 6)}, path)
    with pytest.raises(ConfigError, match="is damaged"):
        load_projections(tmp_path, digest)
    with pytest.raises(ConfigError, match="no projection"):
        load_projections(tmp_path, "0" * 32)


def test_a_direction_points_where_its_largest_number_is_positive():
    """So that no library's choice of a sign makes another projection of the same text."""
    states_ND = np.random.default_rng(0).normal(size=(64, 12)) * np.arange(1, 13)
    found_DE = fit_pca(states_ND.T @ states_ND, 9)
    largest_E = np.abs(found_DE).argmax(axis=0)
    assert (found_DE[largest_E, np.arange(9)] > 0).all()
