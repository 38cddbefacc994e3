"""Every test runs with types checked, dtypes strict, and all warnings errors."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "backend_optimization_level" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_backend_optimization_level=0"  # nearly all the time is compilation
if "host_platform_device_count" not in _flags:
    collect_ignore = ["mesh"]  # which test_mesh.py runs
_hook = install_import_hook("optimorph", "beartype.beartype")
_hook.__enter__()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module")
def float64():
    """Of modules that are about mathematics: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield
