import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config in the working directory and gives its relative name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="c.yaml"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        return name

    return write
