"""Test set-up that must precede jax: eight CPU devices, and stores of what processes compile."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

# Processes that tests start add to these flags: of two of a name the last counts.
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# Nearly all of what the tests take is compiling: without fusion emitters a step takes a third of
# the time. From jaxlib 0.11 on there is nothing else, and the flag would end the process.
if Version(version("jaxlib")) < Version("0.11"):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test may reach a model hub: what is not installed or made by the test does not exist.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def scratch(what: str) -> str:
    """A folder for this session."""
    folder = tempfile.mkdtemp(prefix=f"arcticjax-tests-{what}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# The commands that tests start compile the same few programs in one process after another.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = scratch("programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# So they do with the sources of all that they import, where no bytecode may be left beside them:
# most of what starting them takes.
if sys.dont_write_bytecode:
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = scratch("bytecode")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `tools` and `benchmarks` stand beside the package


def pytest_collection_modifyitems(items):
    """Whole runs first: a long file at the end would leave the other workers idle."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/train/"))


@pytest.fixture
def bucket_store(monkeypatch):
    """An object store on loopback; see `object_store.at_hand`."""
    from tests import object_store

    with object_store.at_hand(monkeypatch) as store:
        yield store


@pytest.fixture(scope="module")
def quick_compiler():
    """For a module that takes most of its time compiling: programs compile in half the time and run
    slower, here and in processes that its tests start."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
