"""Sixteen devices made of one; `test_mesh.py` runs these files with them."""

import jax
import pytest
from trees import MODES


@pytest.fixture(params=MODES, ids=lambda mode: mode.name.lower())
def mode(request):
    """Both kinds of meshes: known to types, and to the compiler alone."""
    return request.param


@pytest.fixture(autouse=True)
def sixteen_devices():
    assert jax.device_count() == 16
