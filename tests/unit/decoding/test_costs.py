"""Cost ratios: their form, and that a larger model's step costs more."""

import pytest

from adaptd.decoding.costs import measure_costs
from tests.unit.learning.conftest import tiny


def test_every_depth_has_its_costs() -> None:
    found = measure_costs(tiny(0), tiny(1), (1, 4))
    assert sorted(found) == [1, 4]
    # One architecture for both: a draft step is about a target step, whatever the machine is doing besides.
    assert 0.2 < found[1].draft < 5
    assert found[1].draft == found[4].draft
    assert all(price.verify >= 0 for price in found.values())


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="depths"):
        measure_costs(tiny(0), tiny(1), (0, 2))
