"""Representation shift against its formula."""

import numpy as np
import pytest

from policies.shift import RepresentationShift


def test_with_all_directions_it_is_the_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(4000, 3)) @ np.array([[2.0, 0.3, 0.0], [0.0, 1.0, 0.4], [0.0, 0.0, 0.5]])
    fitted = RepresentationShift.fit(states, 3)
    points = rng.normal(size=(50, 3)) * 3
    inverse = np.linalg.inv(np.cov(states, rowvar=False))
    centred = points - states.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, inverse, centred))
    assert fitted.distances(points) == pytest.approx(expected, rel=0.02)


def test_a_trace_unlike_the_reference_scores_higher_by_its_tail() -> None:
    rng = np.random.default_rng(0)
    fitted = RepresentationShift.fit(rng.normal(size=(500, 8)), 4)
    usual = rng.normal(size=(20, 8))
    far = usual + 6.0 * (np.arange(20) >= 15)[:, None] * fitted.directions[:, 0]
    assert fitted.score(far, 0.9) > fitted.score(usual, 0.9) + 2
    assert fitted.score(far, 0.5) == pytest.approx(fitted.score(usual, 0.5), abs=0.5)


def test_directions_without_variance_stay_finite() -> None:
    states = np.zeros((10, 4))
    states[:, 0] = np.arange(10)
    assert np.isfinite(RepresentationShift.fit(states, 4).score([[1.0, 1.0, 1.0, 1.0]], 0.9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RepresentationShift.fit(np.zeros((1, 3)), 2), "at least two rows"),
        (lambda: RepresentationShift.fit(np.zeros((5, 3)), 0), "components"),
        (lambda: RepresentationShift.fit(np.eye(3), 2).distances(np.zeros((2, 4))), "as the reference's"),
        (lambda: RepresentationShift.fit(np.eye(3), 2).score(np.zeros((2, 3)), 1.5), "rho"),
        (lambda: RepresentationShift.fit(np.eye(3), 2).score(np.zeros((0, 3)), 0.5), "at least one token"),
    ],
)
def test_an_argument_out_of_range_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
