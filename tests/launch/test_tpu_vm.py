"""TPU VM jobs: the commands that would run, and whole jobs on a stand-in for Google Cloud."""

import contextlib
import json
import os
import signal
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from arcticjax.errors import ConfigError
from launch.commands import Runner
from launch.specs import load
from launch.tpu_vm import __main__ as command
from launch.tpu_vm import gcloud
from launch.tpu_vm.spec import TpuVmSpec
from tests.launch import golden
from tests.launch.stubs import Cloud

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "launch" / "tpu_vm" / "example.yaml"
VERBS = ("create", "setup", "start", "status", "logs", "stop", "delete", "babysit")
REVISION = "0123456789012345678901234567890123456789"
# Whatever a shell might take apart.
EVIL = ["a b", "it's", '"', "$HOME", "`id`", "$(id)", "*", "a\\b", "-x", "; rm -rf /", "é\n", "&&"]


def spec_file(folder: Path, **changes: object) -> Path:
    content = {
        "name": "job",
        "zone": "us-west4-a",
        "accelerator": "v5litepod-16",
        "command": ["python", "-m", "arcticjax.train", "--config", "configs/pretrain_m.yaml"],
    }
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return file


@pytest.fixture
def fixed_revision(monkeypatch):
    monkeypatch.setattr(command.Job, "revision", lambda self: REVISION)


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "secret.env"
    file.write_text("HF_TOKEN=canary-of-a-token\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["one-slice", "spot-slices"])
def test_dry_runs(verb, kind, tmp_path, capsys, fixed_revision, token_file):
    changes: dict = {}
    if kind == "spot-slices":
        changes = {
            "project": "p",
            "slices": 2,
            "spot": True,
            "nfs": "10.0.0.2:/arctic",
            "flags": "v5e-slices",
            "env_file": str(token_file),
            "command": ["python", "-m", "arcticjax.train", "--set", "model.query_prompt=it's: "],
        }
    assert command.main([verb, str(spec_file(tmp_path, **changes)), "--dry-run"]) == 0
    said = capsys.readouterr().out.replace(str(ROOT), "ROOT").replace(str(tmp_path), "TMP")
    assert "canary" not in said
    golden.check(f"tpu_vm-{kind}-{verb}.txt", said)


def test_the_example_is_a_job():
    spec = load(EXAMPLE, TpuVmSpec)
    assert spec.slices == 2 and spec.software == "v2-alpha-tpuv5-lite"


def test_arguments_reach_the_worker_as_they_are(tmp_path):
    """Through gcloud's --command, the remote shell, worker.sh and its session."""
    cloud = Cloud(tmp_path, [None, "ACTIVE"], tpu_env="MEGASCALE_SLICE_ID: '1'\n")
    job = _job(tmp_path, cloud, ["python", "-c", _NOTE, *EVIL])
    with _path(cloud):
        assert job.create() == 0 and job.setup() == 0 and job.start() == 0
        _wait_until_ended(job)
    for n in range(2):
        told = json.loads((tmp_path / f"worker-{n}" / "arcticjax-launch" / "told").read_text())
        assert told["arguments"] == EVIL


def test_processes_of_two_slices_are_numbered_through(tmp_path):
    tpu_env = (
        "ZONE: 'x'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n"
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    )
    cloud = Cloud(tmp_path, [None, "ACTIVE"], tpu_env=tpu_env)
    job = _job(tmp_path, cloud, ["python", "-c", _NOTE])
    with _path(cloud):
        assert not job.create() and not job.setup() and not job.start()
        _wait_until_ended(job)
    for n in range(2):
        told = json.loads((tmp_path / f"worker-{n}" / "arcticjax-launch" / "told").read_text())
        assert told["cluster"] == ["10.9.9.9:8482", "4", str(2 + n)]


def test_every_verb_may_be_repeated(tmp_path, capfd, token_file):
    cloud = Cloud(tmp_path, [None, "ACTIVE"])
    job = _job(tmp_path, cloud, ["python", "-c", _SAVES], env_file=str(token_file))
    with _path(cloud):
        assert job.create() == 0
        for _ in range(2):
            assert job.create() == 0
            assert job.setup() == 0
            assert job.start() == 0
        said = capfd.readouterr().out
        assert said.count("job is there already") == 2
        assert said.count("started as process") == 2 and said.count("running already") == 2
        assert said.count("is set up") == 2
        for n in range(2):
            folder = tmp_path / f"worker-{n}" / "arcticjax-launch"
            _wait_for(folder / "ready")
            assert (folder / "ready").read_text() == "canary-of-a-token"
            assert (folder / "env").stat().st_mode & 0o777 == 0o600
            assert folder.stat().st_mode & 0o777 == 0o700
        assert job.stop() == 0 and job.stop() == 0
        assert [one.code for one in job._look(0.0).workers] == [42, 42]
        assert job.delete() == 0
    assert "canary" not in (tmp_path / "calls.jsonl").read_text()


def test_a_preempted_run_is_started_again_elsewhere_and_ends_well(tmp_path, capfd):
    """The first slices are taken away while it runs; on the next ones it ends with 0."""
    states = [None, None, "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE",
              "SUSPENDING", "SUSPENDED", "SUSPENDED", None, None, "ACTIVE"]  # fmt: skip
    cloud = Cloud(tmp_path, states)
    shared = tmp_path / "shared"
    shared.mkdir()
    job = _job(tmp_path, cloud, ["python", "-c", _RESUMES, str(shared)])
    with _path(cloud):
        assert job.babysit(sleep=lambda seconds: time.sleep(0.2)) == 0
    changes = [verb for verb in cloud.verbs() if verb in ("create", "delete")]
    assert changes == ["create", "delete", "create"]
    assert sorted(file.name for file in shared.iterdir()) == ["begun-0", "begun-1", "done-0",
                                                              "done-1"]  # fmt: skip
    said = capfd.readouterr().out
    assert "job: the slices are SUSPENDED; asking again\n" in said and "job: done\n" in said
    assert said.endswith(_STILL_THERE)


def test_a_config_error_ends_the_babysitter_with_its_code(tmp_path, capfd):
    cloud = Cloud(tmp_path, [None, None, "ACTIVE"])
    job = _job(tmp_path, cloud, ["python", "-c", "import sys; sys.exit(2)"])
    with _path(cloud):
        assert job.babysit(sleep=lambda seconds: time.sleep(0.2)) == 2
    assert "delete" not in cloud.verbs() and capfd.readouterr().out.endswith(_STILL_THERE)


def test_a_babysitter_that_is_interrupted_says_what_still_costs(tmp_path, capfd):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    cloud = Cloud(tmp_path, ["PROVISIONING"])
    job = _job(tmp_path, cloud, ["true"])
    with _path(cloud), pytest.raises(KeyboardInterrupt):
        job.babysit(sleep=interrupted)
    assert capfd.readouterr().out.endswith(_STILL_THERE)


def test_a_machine_that_restarted_counts_as_killed(tmp_path):
    cloud = Cloud(tmp_path, [None, "ACTIVE"], workers=1)
    job = _job(tmp_path, cloud, ["python", "-c", _SAVES])
    with _path(cloud):
        assert not job.create() and not job.setup() and not job.start()
        folder = tmp_path / "worker-0" / "arcticjax-launch"
        _wait_for(folder / "ready")
        os.killpg(int((folder / "pid").read_text()), 9)
        _wait_until_ended(job)
        assert [one.code for one in job._look(0.0).workers] == [137]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator": "h100-8"}, "no software version is known"),
        ({"accelerator": "v5e 16"}, "accelerator: String should match"),
        ({"name": "A_b"}, "name: String should match"),
        ({"nfs": "server:/x y"}, "nfs: String should match"),
        ({"slices": 0}, "slices: Input should be greater"),
        ({"spott": True}, "spott: Extra inputs are not permitted"),
        ({"flags": "v9"}, "no preset 'v9'"),
        ({"command": []}, "command: List should have at least 1"),
        ({"command": ["x", "--set", "a.token=hf_" + "x" * 30]}, "looks like a secret"),
        ({"command": ["env", "WANDB_API_KEY=abc"]}, "looks like a secret"),
    ],
)
def test_wrong_specs_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(spec_file(tmp_path, **changes), TpuVmSpec)


@pytest.mark.parametrize("verb", ["create", "setup", "babysit"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_asked_for_without_the_environment_file(
    verb, dry_run, tmp_path, token_file, capsys
):
    """Slices would be paid for before the set-up finds out; a dry run would break off midway."""
    cloud = Cloud(tmp_path, [None])
    words = [verb, str(spec_file(tmp_path, env_file=str(token_file)))]
    words += ["--dry-run"] if dry_run else []
    token_file.chmod(0o644)
    with _path(cloud):
        with pytest.raises(ConfigError, match="others can read"):
            command.main(words)
        token_file.unlink()
        with pytest.raises(ConfigError, match=r"no file .*take env_file out"):
            command.main(words)
    assert not (tmp_path / "calls.jsonl").exists() and not capsys.readouterr().out


def test_gcloud_that_fails_is_not_taken_for_an_absent_job(tmp_path):
    file = tmp_path / "bin" / "gcloud"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\necho 'ERROR: You do not have an active account' >&2; exit 1\n")
    file.chmod(0o755)
    job = command.Job(load(spec_file(tmp_path), TpuVmSpec), Runner())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
        with pytest.raises(ConfigError, match="active account"):
            job.create()


@pytest.mark.parametrize("verb", ["create", "delete", "describe", "ssh", "scp"])
def test_gcloud_knows_every_option(verb):
    """Against the help of gcloud 528 (2025-06): its commands refuse an unknown option."""
    known = set((Path(__file__).parent / "gcloud_options.txt").read_text().split())
    spec = TpuVmSpec(
        name="job", command=["x"], zone="z", project="p", accelerator="v6e-8", slices=2, spot=True
    )
    one = spec.model_copy(update={"slices": 1})
    commands = {
        "create": [gcloud.create(spec), gcloud.create(one)],
        "delete": [gcloud.delete(spec)],
        "describe": [gcloud.describe(spec)],
        "ssh": [gcloud.worker(spec, "status")],
        "scp": [gcloud.copy_to_all_workers(spec, ["x"])],
    }
    for words in commands[verb]:
        assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", verb]
        for word in words:
            if word.startswith("--"):
                assert f"{verb}:{word.partition('=')[0]}" in known


_STILL_THERE = (
    "job: the slices are still there, for their logs, and cost money; to delete them: "
    "gcloud compute tpus queued-resources delete job --force --quiet --zone=us-west4-a\n"
)
_NOTE = textwrap.dedent("""
    import json, os, pathlib, sys
    names = ("COORDINATOR", "PROCESSES", "PROCESS")
    told = {"arguments": sys.argv[1:], "cluster": [os.environ["ARCTICJAX_" + n] for n in names]}
    pathlib.Path(os.environ["HOME"], "arcticjax-launch", "told").write_text(json.dumps(told))
""")
_SAVES = textwrap.dedent("""
    import os, pathlib, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    folder = pathlib.Path(os.environ["HOME"], "arcticjax-launch")
    (folder / "ready.tmp").write_text(os.environ.get("HF_TOKEN", ""))
    (folder / "ready.tmp").rename(folder / "ready")
    time.sleep(600)
""")
_RESUMES = textwrap.dedent("""
    import os, pathlib, sys, time
    mine, folder = os.environ["ARCTICJAX_PROCESS"], pathlib.Path(sys.argv[1])
    if (folder / f"begun-{mine}").exists():
        (folder / f"done-{mine}").touch()
        sys.exit()
    (folder / f"begun-{mine}").touch()
    time.sleep(600)
""")


def _job(folder: Path, cloud: Cloud, words: list[str], **changes: object) -> command.Job:
    spec = load(spec_file(folder, command=words, **changes), TpuVmSpec)
    return command.Job(spec, Runner())


def _path(cloud: Cloud):
    patch = pytest.MonkeyPatch.context()

    class Patched:
        def __enter__(self):
            made = patch.__enter__()
            made.setenv("PATH", cloud.path)
            made.chdir(ROOT)

        def __exit__(self, *error):
            for file in cloud.root.glob("worker-*/arcticjax-launch/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(file.read_text()), signal.SIGKILL)
            return patch.__exit__(*error)

    return Patched()


def _wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {file}")


def _wait_until_ended(job: command.Job) -> None:
    for _ in range(600):
        found = job._look(0.0).workers
        if found and all(one.state == "ended" for one in found):
            return
        time.sleep(0.05)
    raise AssertionError("did not end")
