"""Reading folders by sentence-transformers without a process of its own each time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcticjax.export import readers, torch_states, torch_vectors

SCRIPTS = {"torch_vectors.py": torch_vectors.main, "torch_states.py": torch_states.main}


def run_here(name: str, *arguments: Path) -> str:
    """`readers._run_script`, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert SCRIPTS[name](*map(str, arguments)) == 0
    return said.getvalue().strip().splitlines()[-1]


@contextlib.contextmanager
def torch_here() -> Iterator[None]:
    """This process imports torch, once for all that it runs: that takes longer than all the rest.
    That exports are read by a process of its own is tested with the published weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_run_script", run_here)
        yield
