"""Expected output in files: ARCTICJAX_WRITE_GOLDEN=1 writes them anew, for a diff to be read."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).with_name("golden")


def check(name: str, text: str) -> None:
    """Compares with the file of this name."""
    file = FOLDER / name
    if os.environ.get("ARCTICJAX_WRITE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
