"""What a run says of its data, and the pairs that it drew by then."""

import json

import numpy as np

from arcticjax.config import load_config
from arcticjax.data import catalog, stored
from arcticjax.data.draw import Draw
from arcticjax.data.lineage import describe, pairs_drawn
from arcticjax.models.tokenizer import TextTokenizer
from tests import tiny


def sources(folder, *given):
    return {"data.sources": list(given), "data.cache": str(folder / "cache")}


def test_licence_and_language_reach_manifest_and_record(tmp_path):
    tiny.run_config(tmp_path)
    path = str(tmp_path / "a.parquet")
    stated = {"name": "a", "path": path, "licence": "cc0-1.0", "language": ["en"]}
    silent = {"name": "b", "path": str(tmp_path / "b.parquet")}
    config = load_config(tiny.run_config(tmp_path, **sources(tmp_path, stated, silent)))
    tokenizer = TextTokenizer.from_file(tmp_path / "model")
    opened = catalog.open_sources(config, tokenizer)
    manifest = opened.views[0].parts[0].manifest
    assert manifest["licence"] == "cc0-1.0" and manifest["language"] == ["en"]
    assert "licence" not in opened.views[1].parts[0].manifest

    found = json.loads(json.dumps(describe(config, opened)))
    first, second = (view["parts"][0] for view in found["views"])
    assert first["licence"] == "cc0-1.0" and first["language"] == ["en"]
    assert first["pairs"] == 96 and first["tokens"] == manifest["tokens"]
    assert set(second) == {"name", "pairs", "tokens"}

    # A stored source keeps what it says; the config has the last word, without tokenising again.
    folder = str(opened.views[0].parts[0].directory)
    used = {"name": "again", "path": folder, "licence": "mit"}
    config = load_config(tiny.run_config(tmp_path, **sources(tmp_path, used)))
    reopened = catalog.open_sources(config, tokenizer)
    part = describe(config, reopened)["views"][0]["parts"][0]
    assert part["name"] == "again" and part["licence"] == "mit" and part["language"] == ["en"]


def test_hub_names_are_datasets(tmp_path):
    tiny.run_config(tmp_path)
    tokenizer = TextTokenizer.from_file(tmp_path / "model")
    made = stored.write_source(
        tmp_path / "made", "web", tiny.pairs(0, 40), tokenizer, origin={"path": "hub:owner/web"}
    )
    given = {"name": "web", "path": "hub:owner/web?split=train"}
    config = load_config(tiny.run_config(tmp_path, **sources(tmp_path, given)))
    view = catalog.SourceView("web", [made])
    found = describe(config, catalog.Catalog([view], "print", None))
    assert found["views"][0]["parts"][0]["dataset"] == "owner/web"


def test_pairs_drawn_are_those_of_the_draw():
    for weights in (None, [1.0, 3.0, 1.0]):
        sizes, batch, seed = [100, 47, 230], 10, 5
        drawn = Draw(sizes, batch, seed, weights)
        description = {
            "global_batch": batch,
            "seed": seed,
            "views": [
                {"records": size, "weight": None if weights is None else weights[place]}
                for place, size in enumerate(sizes)
            ],
        }
        for steps in (0, 1, 17, drawn.steps_per_epoch, 3 * drawn.steps_per_epoch + 7):
            counts = np.bincount([drawn.at(step).source for step in range(steps)], minlength=3)
            assert pairs_drawn(description, steps) == [10 * int(count) for count in counts]
