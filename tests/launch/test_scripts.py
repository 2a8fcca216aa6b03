"""What all launchers have in common: shell scripts without faults, and secrets nowhere."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcticjax.errors import ConfigError
from launch.commands import Runner, check_no_secret

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")])
TOKENS = [
    "hf_" + "a1" * 17,
    "sk-" + "a1" * 12,
    "AIza" + "b" * 35,
    "ghp_" + "c" * 36,
    "AKIA" + "D" * 16,
    "-----BEGIN RSA PRIVATE KEY-----",
    "WANDB_API_KEY=0123456789",
    "HF_TOKEN=x",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-s", "bash", "-S", "style", script], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("token", TOKENS)
def test_a_secret_stops_a_command_before_it_runs(token, tmp_path, capsys):
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match="looks like a secret") as refused:
            Runner(dry_run).run(["touch", str(tmp_path / "made"), f"x {token} y"])
        # Nor does the message, which ends in a log, hold it.
        assert token not in str(refused.value)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_ordinary_words_are_no_secrets():
    check_no_secret(["--set", "model.query_prompt=query: ", "risk-averse-and-long-words", "hf_hub",
                     "data.tokenizer=x", "run.directory=/a/b", "sk-learn"])  # fmt: skip


def test_a_program_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="gcloud: not found on this machine"):
        Runner().run(["gcloud", "version"])


def test_a_command_reads_what_it_is_given(capfd):
    assert Runner().run(["cat"], stdin="a\nb\n") == 0
    assert capfd.readouterr().out == "a\nb\n"


def test_a_shown_command_is_one_that_a_shell_runs_so(tmp_path, capsys):
    words = ["printf", "%s|", "a b", "it's", "$HOME", "`id`", "*", "é\n"]
    Runner(dry_run=True).run(words)
    shown = capsys.readouterr().out
    said = subprocess.run(["bash", "-c", shown], capture_output=True, check=True, cwd=tmp_path)
    assert said.stdout.decode() == "".join(f"{word}|" for word in words[2:])


def test_the_package_never_imports_launch():
    for file in (ROOT / "arcticjax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not any(name.partition(".")[0] == "launch" for name in names), file


def test_importing_the_launchers_does_not_load_jax():
    code = (
        "import sys, launch.local, launch.flags, launch.tpu_vm.__main__, launch.gke.__main__\n"
        "import launch.slurm.__main__\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=True)
