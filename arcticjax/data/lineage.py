"""What a run draws from, as a record that outlives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arcticjax.config import RunConfig, SourceConfig
from arcticjax.data import draw
from arcticjax.data.adapters import HUB
from arcticjax.data.catalog import Catalog
from arcticjax.data.lists import StoredLists
from arcticjax.data.stored import StoredSource


def describe(config: RunConfig, catalog: Catalog) -> dict[str, Any]:
    """The sources of a run as JSON: sizes and weights as drawn, and of every part its pairs and
    tokens, and licence, language and dataset where its config or manifest states them."""
    stated = {source.name: source for source in config.data.sources}
    return {
        "fingerprint": catalog.fingerprint,
        "global_batch": config.train.global_batch,
        "seed": config.run.seed,
        "views": [
            {
                "name": view.name,
                "records": len(view),
                "weight": view.weight,
                "parts": [
                    # A stored source that stands alone may have another name in its manifest.
                    _part(part, stated.get(view.name if len(view.parts) == 1 else part.name))
                    for part in view.parts
                ],
            }
            for view in catalog.views
        ],
    }


def pairs_drawn(description: Mapping[str, Any], steps: int) -> list[int]:
    """Pairs that the first `steps` steps of a run draw from each of its views; repeats count."""
    views: Sequence[Mapping[str, Any]] = description["views"]
    weights = [view["weight"] for view in views]
    drawn = draw.Draw(
        [view["records"] for view in views],
        description["global_batch"],
        description["seed"],
        None if None in weights else weights,
    )
    cycles, rest = divmod(steps, drawn.steps_per_epoch)
    batches = cycles * np.array(drawn.batches_per_cycle)
    keys = draw.permutation_keys("slots", drawn.seed, cycles)
    slots = draw.permute(np.arange(rest), drawn.steps_per_epoch, keys)
    ends = np.cumsum(drawn.batches_per_cycle)
    batches += np.bincount(np.searchsorted(ends, slots, side="right"), minlength=len(views))
    return [int(count) * drawn.global_batch for count in batches]


def _part(part: StoredSource | StoredLists, source: SourceConfig | None) -> dict[str, Any]:
    """One source; `source` is its place in the config, which has the last word."""
    manifest = part.manifest
    facts = {
        "name": part.name if source is None else source.name,
        "pairs": manifest["positives" if isinstance(part, StoredLists) else "pairs"],
        "tokens": manifest.get("tokens"),
        "licence": (source and source.licence) or manifest.get("licence"),
        "language": (source and source.language) or manifest.get("language"),
    }
    if source is not None and source.path.startswith(HUB):
        facts["dataset"] = source.path.removeprefix(HUB).partition("?")[0]
    return {key: value for key, value in facts.items() if value}
