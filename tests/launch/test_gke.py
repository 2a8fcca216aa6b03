"""GKE manifests: stored ones, the fields that Kubernetes, JobSet and Kueue know, and what the exit
codes of a run lead to."""

import copy
import json
import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from arcticjax import errors
from arcticjax.errors import ConfigError
from launch.exit_codes import RESTART, outcome
from launch.gke import __main__ as command
from launch.gke import manifest
from launch.gke.spec import GkeSpec
from launch.specs import load
from tests.launch import golden
from tests.launch.custom_objects import problems

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "launch" / "gke" / "example.yaml"
BASE = {"name": "job", "image": "registry/image:1", "command": ["python", "-m", "arcticjax.train"]}
SPECS = {
    "tpu-one-host": {"tpu": {"kind": "v6e", "topology": "2x2"}},
    "tpu-slices-spot": {
        "tpu": {"kind": "v5e", "topology": "4x8", "slices": 4},
        "spot": True,
        "queue": "training",
        "volume_claim": "arctic",
        "secret": "tokens",
        "flags": "v5e-slices",
        "namespace": "ml",
        "service_account": "trainer",
    },
    "tpu-cube": {"tpu": {"kind": "v5p", "topology": "2x2x4"}, "queue": "q"},
    "gpu": {
        "gpu": {"accelerator": "nvidia-h100-80gb", "nodes": 2},
        "queue": "gpus",
        "flags": "gpu",
    },
    "cpu": {"cpu": {"nodes": 3}, "queue": "cpus", "command": ["a b", "it's", "$(HOME) $x", "é"]},
}


def spec_file(folder: Path, content: dict) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({**BASE, **content}))
    return file


@pytest.fixture(params=SPECS)
def kind(request):
    return request.param


@pytest.fixture
def spec(kind):
    return GkeSpec.model_validate({**BASE, **SPECS[kind]})


def job(spec: GkeSpec) -> dict:
    """The JobSet's job, as an object of its own."""
    [replicated] = manifest.jobset(spec)["spec"]["replicatedJobs"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": replicated["template"]["spec"],
    }


def test_manifests_are_the_stored_ones(kind, tmp_path, capsys):
    file = spec_file(tmp_path, SPECS[kind])
    assert command.main(["render", str(file)]) == 0
    if "queue" in SPECS[kind]:
        print("---")
        command.main(["render-queue", str(file)])
    golden.check(f"gke-{kind}.yaml", capsys.readouterr().out)


def test_jobset_and_kueue_know_every_field(spec):
    objects = [manifest.jobset(spec), *(manifest.queue(spec) if spec.queue else [])]
    assert [problems(one) for one in objects] == [[]] * len(objects)


def test_kubernetes_knows_every_field_of_the_job(spec):
    kubernetes_validate.validate(job(spec), kubernetes_validate.latest_version(), strict=True)


def test_a_slip_would_be_found():
    spec = GkeSpec.model_validate({**BASE, **SPECS["gpu"]})
    slip = copy.deepcopy(manifest.jobset(spec))
    slip["spec"]["failurePolicy"]["maxRestart"] = slip["spec"]["failurePolicy"].pop("maxRestarts")
    slip["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    assert problems(slip) == [
        "JobSet.spec.failurePolicy.maxRestart: unknown",
        "JobSet.spec.failurePolicy.rules[].action: 'Fail'",
    ]
    wrong = job(spec)
    wrong["spec"]["backofLimit"] = wrong["spec"].pop("backoffLimit")
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_a_queue_covers_all_that_its_pods_ask_for(spec):
    if spec.queue is None:
        return
    _, cluster_queue, _ = manifest.queue(spec)
    [group] = cluster_queue["spec"]["resourceGroups"]
    [container] = job(spec)["spec"]["template"]["spec"]["containers"]
    assert set(group["coveredResources"]) == set(container["resources"]["requests"])


def test_every_exit_of_a_run_is_mapped(spec):
    """As the Job controller and JobSet go through their rules, for one pod that failed."""
    body = manifest.jobset(spec)["spec"]
    policy = job(spec)["spec"]
    assert policy["template"]["spec"]["restartPolicy"] == "Never" and policy["backoffLimit"] == 0

    def action(code: int) -> str:
        [rule] = policy["podFailurePolicy"]["rules"]
        on = rule["onExitCodes"]
        assert (on["operator"], rule["action"]) == ("NotIn", "FailJob")
        reason = "PodFailurePolicy" if code not in on["values"] else "BackoffLimitExceeded"
        for rule in body["failurePolicy"]["rules"]:
            if reason in rule["onJobFailureReasons"]:
                return rule["action"]
        return "RestartJobSet"

    known = [error.exit_code for error in errors.ArcticError.__subclasses__()]
    for code in {1, 127, 130, 255, *known, *RESTART}:
        expected = {"restart": "RestartJobSet", "fail": "FailJobSet"}[outcome([code])]
        assert action(code) == expected, code


def test_words_reach_the_container_as_they_are():
    """Kubernetes replaces $(NAME); $$ is its dollar."""
    words = ["$(HOME)", "$HOME", "$$", "a b", "it's"]
    spec = GkeSpec.model_validate({**BASE, **SPECS["cpu"], "command": words})
    [container] = job(spec)["spec"]["template"]["spec"]["containers"]
    assert [word.replace("$$", "$") for word in container["command"]] == words
    assert all("$(" not in word.replace("$$", "") for word in container["command"])


def test_nodes_of_a_slice_are_counted():
    def nodes(**tpu):
        return GkeSpec.model_validate({**BASE, "tpu": tpu}).nodes

    assert nodes(kind="v5e", topology="16x16") == 64
    assert nodes(kind="v5e", topology="2x4", chips_per_node=8) == 1
    assert nodes(kind="v5p", topology="4x4x4") == 16
    assert nodes(kind="v6e", topology="1x1") == 1


@pytest.mark.parametrize("verb", ["submit", "status", "logs", "delete"])
def test_dry_runs(verb, tmp_path, capsys):
    file = spec_file(tmp_path, {**SPECS["gpu"], "namespace": "ml"})
    assert command.main([verb, str(file), "--dry-run"]) == 0
    golden.check(f"gke-{verb}.txt", capsys.readouterr().out)


def test_the_example_is_a_job():
    spec = load(EXAMPLE, GkeSpec)
    assert (spec.groups, spec.nodes) == (2, 4)


def test_kubectl_gets_the_manifest(tmp_path, monkeypatch):
    """Twice: apply leaves alone what is there."""
    stub = tmp_path / "kubectl"
    stub.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/words\ncat >> {tmp_path}/stdin\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = spec_file(tmp_path, SPECS["cpu"])
    assert command.main(["submit", str(file)]) == 0
    assert (tmp_path / "words").read_text().split() == ["--namespace=default", "apply", "-f", "-"]
    sent = yaml.safe_load((tmp_path / "stdin").read_text())
    assert sent == json.loads(json.dumps(manifest.jobset(load(file, GkeSpec))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of tpu, gpu and cpu"),
        ({"cpu": {}, "gpu": {"accelerator": "x"}}, "given: gpu, cpu"),
        ({"tpu": {"kind": "v5e", "topology": "4x4x4"}}, "has 2 sides"),
        ({"tpu": {"kind": "v5e", "topology": "3x3"}}, "do not divide into nodes"),
        ({"tpu": {"kind": "v5e", "topology": "2x2", "slices": 2}}, "slices of several nodes"),
        ({"tpu": {"kind": "v9", "topology": "4x4"}}, "tpu.kind"),
        ({"cpu": {}, "grace_seconds": 5}, "grace_seconds"),
        ({"cpu": {}, "secrets": "x"}, "secrets: Extra inputs"),
    ],
)
def test_wrong_specs_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(spec_file(tmp_path, changes), GkeSpec)


def test_a_queue_that_is_not_set_cannot_be_rendered(tmp_path):
    with pytest.raises(ConfigError, match="queue is not set"):
        command.main(["render-queue", str(spec_file(tmp_path, {"cpu": {}}))])
