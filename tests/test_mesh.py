"""The tests of `mesh/`, each file in a process of its own with sixteen devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mesh"
FLAGS = (
    "--xla_force_host_platform_device_count=16 "
    "--xla_backend_optimization_level=0 "  # compiles in a third of the time
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "  # but in the order that needs least memory
)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_sixteen_devices(file):
    flags = FLAGS + os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    process = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
