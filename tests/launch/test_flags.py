"""Presets of compiler flags: how they reach a command; the installed compiler knows them."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcticjax.errors import ConfigError
from launch import flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def libtpu(monkeypatch):
    """Sets the version of libtpu that is found."""
    real = importlib.metadata.version

    def found(version):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == "libtpu" else real(name)
        )

    return found


def test_what_the_user_set_comes_last_so_it_wins(libtpu):
    libtpu("0.0.43")
    own = "--xla_tpu_scoped_vmem_limit_kib=1"
    value = flags.variables("v6e", {"LIBTPU_INIT_ARGS": own})["LIBTPU_INIT_ARGS"]
    assert value.endswith(f"--xla_tpu_scoped_vmem_limit_kib=98304 {own}")
    given = flags.variables("gpu", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})
    assert given["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.parametrize("version", ["0.0.41", "0.1.0"])
def test_another_version_is_refused(libtpu, version):
    libtpu(version)
    with pytest.raises(ConfigError, match=f"this is {version}"):
        flags.variables("v5e", {})


def test_a_missing_package_and_an_unknown_preset_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"no preset 'v9'; there are v5e, .*gpu"):
        flags.main(["v9"])

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match="needs libtpu, which is not installed"):
        flags.variables("v5p", {})


def test_the_command_gets_them_and_takes_this_process_over():
    program = "import os; print(os.environ['XLA_FLAGS'], os.getpid())"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.flags", "gpu", "--", sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--own"},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert out == f"--xla_gpu_enable_latency_hiding_scheduler=true --own {process.pid}\n"


def test_they_are_printed_as_a_shell_reads_them(capsys):
    assert flags.main(["gpu"]) == 0
    said = capsys.readouterr().out
    shown = subprocess.run(
        ["bash", "-c", f"{said}\necho $XLA_PYTHON_CLIENT_MEM_FRACTION"],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    ).stdout  # fmt: skip
    assert shown == "0.9\n"


def test_the_installed_jaxlib_knows_the_flags_for_gpus():
    """It ends the process at an unknown one, whatever the platform."""
    given = flags.variables("gpu", {})["XLA_FLAGS"]
    program = "from jaxlib import xla_client; xla_client.make_cpu_client(); print('started')"

    def starts(arguments: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "XLA_FLAGS": arguments},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0 and "started" in done.stdout

    assert starts(given)
    assert not starts(f"{given} --xla_gpu_no_such_flag=true")


_COMPILE = """
import jax
from arcticjax.plan import topology
target = topology.parse({slice!r})
topology.prepare_environment(target)
device = topology.open_devices(target)[0]
sharding = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=sharding)
jax.jit(lambda x: x @ x).lower(x).compile()
print("compiled")
"""


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", [name for name in flags.PRESETS if name.endswith("-slices")])
def test_the_installed_tpu_compiler_knows_every_flag(name):
    """It ends the process at an unknown one. Presets for several slices hold those for one."""
    one = flags.PRESETS[name.removesuffix("-slices")].variables["LIBTPU_INIT_ARGS"].split()
    assert set(one) < set(flags.PRESETS[name].variables["LIBTPU_INIT_ARGS"].split())
    kind = name.partition("-")[0]
    size = "2x2x1" if kind == "v5p" else "2x2"
    given = flags.variables(name, {})["LIBTPU_INIT_ARGS"]

    def compiles(arguments: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE.format(slice=f"{kind}:{size}")],
            cwd=ROOT,
            env={**os.environ, "LIBTPU_INIT_ARGS": arguments, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0 and "compiled" in done.stdout

    assert compiles(given)
    assert not compiles(f"{given} --xla_tpu_no_such_flag=true")
