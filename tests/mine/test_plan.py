"""What mining takes, computed by hand for one size."""

import pytest

from arcticjax.config import MineConfig
from arcticjax.errors import ConfigError
from arcticjax.mine import plan
from arcticjax.models.presets import PRESETS
from arcticjax.parallel.chips import CHIPS

CONFIG = {"teacher": "m", "input": "x", "output": "out", "precision": "bfloat16"}


def planned(chip="v5e", queries=10**6, documents=10**7, **changes):
    return plan.make_plan(
        MineConfig.model_validate(CONFIG | changes),
        PRESETS["m"],
        109_000_000,
        queries,
        documents,
        CHIPS[chip],
        8,
        lengths=(16, 200),
        row_length=512,
    )


def test_a_million_queries_and_ten_million_documents_on_eight_chips():
    found = planned()
    assert found.fits and found.blocks == 1
    # Documents of a chip, weights, and less than 100 MB of scores.
    least = 4 * (10**7 / 8 * 768 + 109e6)
    assert least < found.hbm_bytes < least + 1e8
    assert found.disk_embeddings == 11 * 10**6 * 768 * 4
    assert found.disk_candidates == 10**6 * 1000 * 12
    assert found.product_seconds == pytest.approx(6 * 2 * 1e13 * 768 / (8 * 197e12 * 0.5))
    text = plan.to_text(found)
    assert "1,000,000 queries x 10,000,000 documents x 768, top 1,000, on 8 v5e" in text
    assert ": fits; 1 block(s)" in text


def test_texts_of_a_beir_folder_stay_in_memory():
    pairs, listed = planned(), planned(input="beir:x")
    assert pairs.text_bytes == 40 * 11 * 10**6
    assert listed.text_bytes == 5 * (16 * 10**6 + 200 * 10**7) + 250 * 11 * 10**6
    assert listed.host_bytes - pairs.host_bytes == listed.text_bytes - pairs.text_bytes
    assert "GB beside the program, 12.83 GB of it for the" in plan.to_text(listed)


def test_what_does_not_fit_is_cut_into_blocks():
    found = planned(documents=4 * 10**7)
    assert found.fits and found.blocks == 2
    assert found.disk_candidates == 10**6 * 1000 * 12 * 3
    forced = planned(documents=5 * 10**7, document_block=5 * 10**7)
    assert not forced.fits and "does not fit; set document_block lower" in plan.to_text(forced)


def test_float32_takes_six_times_as_long_to_embed():
    assert planned(precision="float32").embed_seconds == 6 * planned().embed_seconds


def test_gpus_have_what_jax_takes_of_their_memory(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    found = planned("h200", documents=2 * 10**8)
    assert found.fits and found.blocks == 3
    whole = planned("h200", documents=2 * 10**8, document_block=2 * 10**8)
    assert not whole.fits and f"of {0.5 * 150_121_545_728 / 1e9:.2f} GB" in plan.to_text(whole)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert planned("h200", documents=2 * 10**8, document_block=2 * 10**8).fits
    slower = planned("h200", precision="float32").embed_seconds / planned("h200").embed_seconds
    assert slower == pytest.approx(989 / 67)


@pytest.mark.parametrize("text", ["v5e", "v9:2x4", "v5e:0", "8", "v5e:2x"])
def test_slices(text):
    assert plan.parse_slice("v5p:2x2x2") == (CHIPS["v5p"], 8)
    assert plan.parse_slice("h200:8") == (CHIPS["h200"], 8)
    with pytest.raises(ConfigError, match="--topology"):
        plan.parse_slice(text)
