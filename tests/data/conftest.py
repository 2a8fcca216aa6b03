import pytest

from arcticjax.config.schema import SourceConfig
from arcticjax.data import catalog, list_sources
from arcticjax.models.tokenizer import TextTokenizer
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer.from_file(tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Fields of a source, and the other sources of the run -> its lists."""

    def one(others=(), **fields):
        return list_sources.open_source(
            SourceConfig(name="one", **fields),
            tmp_path / "cache",
            tokenizer,
            lambda source: catalog.open_cached(source, tmp_path / "cache", tokenizer),
            others,
        )

    return one
