"""The tests of `mesh/`, in processes of their own with sixteen devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mesh"
FILES = sorted(str(path) for path in FOLDER.glob("test_*.py"))
PROCESSES = 3


def run(files, kind):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=16"
    flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # in the order that needs least memory
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-m", kind, *files],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


def asked(pytestconfig, kind):
    """Those of a kind that were asked for: `pytest -m "not nightly"` leaves the nightly ones out."""
    expression = pytestconfig.getoption("markexpr")
    return f"{kind} and ({expression})" if expression else kind


def test_quick_ones(pytestconfig):
    run(FILES, asked(pytestconfig, "not slow"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PROCESSES))
def test_slow_ones(part, pytestconfig):
    run(FILES[part::PROCESSES], asked(pytestconfig, "slow"))
