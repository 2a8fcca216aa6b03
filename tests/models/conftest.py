import pytest

from tests.models.folders import complete


@pytest.fixture
def folder(tmp_path):
    """A complete tiny sentence-transformers folder: cls, prompts, 48 tokens."""
    return complete(tmp_path / "model")
