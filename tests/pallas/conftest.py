"""No kernel that a test interprets may race."""

import pytest

from tests.pallas import races


@pytest.fixture(autouse=True)
def _no_races():
  with races.recorded() as found:
    yield
  assert not any(state.races_found for state in found), 'a kernel races'
