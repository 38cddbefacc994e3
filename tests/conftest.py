"""Every test runs with types checked, dtypes strict, and all warnings errors."""

import collections
import fnmatch
import gc
import os
import zlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "backend_optimization_level" not in _flags:  # nearly all the time is compilation
    _flags += " --xla_backend_optimization_level=0"
    if version("jaxlib") < "0.11":  # later ones have no other emitters, and need the parts
        _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = _flags
collect_ignore = [] if "host_platform_device_count" in _flags else ["mesh"]  # which test_mesh.py runs
if not any(find_spec(compiler) for compiler in ("libtpu", "jax_cuda12_plugin")):
    collect_ignore.append("accelerators")  # which .ci/accelerators runs
_hook = install_import_hook("optimorph", "types_checked.at_first_call")
_hook.__enter__()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


gc.set_threshold(50_000, 20, 10)  # compilation makes many objects and few cycles: a seventh of the time

PROGRAMS = 1500
"""In memory at once. Each has up to 23 memory maps; a process may have 65,530, and XLA crashes beyond."""
_events = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _events.update([event]))


def pytest_runtest_teardown():
    if _events["/jax/core/compile/backend_compile_duration"] > PROGRAMS:
        jax.clear_caches()
        _events.clear()


@pytest.fixture(scope="module")
def float64():
    """Of modules that are about mathematics: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.examples("adam", "*-float32")`: all other cases of the test are slow.

    Of slow cases seven of eight are nightly, and of all cases every second one is `second`, by a checksum of
    the name. The longest tests begin first, so that no process waits for them in the end.
    """
    for item in items:
        mark = item.get_closest_marker("examples")
        if mark and not any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in mark.args):
            item.add_marker("slow")
        if hasattr(item, "callspec") and not _is_of_meshes(item):
            checksum = zlib.crc32(item.name.encode())
            if item.get_closest_marker("slow") and checksum % 8:
                item.add_marker("nightly")
            if checksum % 2:
                item.add_marker("second")
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    items.sort(key=lambda item: not _is_of_meshes(item))


def _is_of_meshes(item):
    """A test that runs those of `mesh/`."""
    return item.nodeid.startswith("tests/test_mesh.py")
