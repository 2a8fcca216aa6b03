"""How processes find each other, from the environment alone."""

import jax
import pytest

from arcticjax import errors
from arcticjax.parallel import distributed

EXPLICIT = {
    "ARCTICJAX_COORDINATOR": "host:1234",
    "ARCTICJAX_PROCESSES": "4",
    "ARCTICJAX_PROCESS": "3",
}
ALONE = {**EXPLICIT, "ARCTICJAX_PROCESSES": "1", "ARCTICJAX_PROCESS": "0"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"},
        {"TPU_WORKER_HOSTNAMES": "only-one"},
        ALONE,
    ],
)
def test_one_process_needs_no_cluster(environ):
    assert distributed.detect(environ) is None


@pytest.mark.parametrize(
    "environ, kind",
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[0-1]"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "openmpi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "tpu"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_clusters_that_jax_detects_itself(environ, kind):
    assert distributed.detect(environ) == distributed.Cluster(kind)


def test_the_explicit_start_goes_before_a_detected_one():
    found = distributed.detect({**EXPLICIT, "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a"})
    assert found == distributed.Cluster("explicit", "host:1234", 4, 3)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"ARCTICJAX_PROCESS": ""}, "ARCTICJAX_PROCESS not; set all three or none"),
        ({"ARCTICJAX_PROCESSES": "four"}, "must be whole numbers"),
        ({"ARCTICJAX_PROCESS": "4"}, r"ARCTICJAX_PROCESS=4 is not in 0\.\.3"),
    ],
)
def test_half_a_description_is_refused(changes, match):
    with pytest.raises(errors.ConfigError, match=match):
        distributed.detect({**EXPLICIT, **changes})


@pytest.mark.parametrize("policy", ["required", "preferred"])
def test_a_platform_that_is_not_there(policy, monkeypatch, capsys):
    """Required: a clear error; preferred: the CPU and a loud line."""
    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.append((name, value)))
    monkeypatch.setattr(distributed, "detect", lambda environ: None)

    def backend():
        # As jax does with a list of platforms of which the first fails.
        if chosen[-1][1] == "tpu":
            raise RuntimeError("Unable to initialize backend 'tpu'")
        return "cpu"

    monkeypatch.setattr(jax, "default_backend", backend)
    if policy == "required":
        with pytest.raises(errors.ConfigError, match=r"no tpu device.*arcticjax\[tpu\].*preferred"):
            distributed.start("tpu", policy)
    else:
        distributed.start("tpu", policy)
        assert "WARNING: mesh.platform is tpu" in capsys.readouterr().err
        assert chosen == [("jax_platforms", "tpu,cpu")]
