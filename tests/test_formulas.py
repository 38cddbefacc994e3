"""Every transform and recipe equals its paper, step by step."""

import catalog
import formulas
import jax
import pytest


@pytest.mark.parametrize("entry", catalog.ENTRIES, ids=catalog.IDS)
def test_float64(entry):
    with jax.enable_x64(True):
        assert formulas.worst_error(entry.build(), entry, "float64") < formulas.tolerance(entry, "float64")


@pytest.mark.examples("adamw*-float32", "muon*-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("entry", catalog.ENTRIES, ids=catalog.IDS)
def test_low_precision(entry, dtype):
    assert formulas.worst_error(entry.build(), entry, dtype) < formulas.tolerance(entry, dtype)
