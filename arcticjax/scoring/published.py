"""Published nDCG@10 on MTEB's 15 English retrieval scores: what ours stand beside, not claims.

Sources are beside each table. Published percentages are fractions here.
"""

from __future__ import annotations

import csv
from pathlib import Path

from arcticjax.scoring.benchmarks import RETRIEVAL_15

# Score -> value, by column: float32, int8 and int4 of m-v1.5 truncated to 256 dimensions. Source:
# the notebook on compression in https://github.com/Snowflake-Labs/arctic-embed, which gives the
# means 0.54234, 0.54275 and 0.53729.
_M_V1_5_256 = {
    "ArguAna": (0.58476, 0.58636, 0.57953),
    "CQADupstackRetrieval": (0.44210, 0.44197, 0.43343),
    "ClimateFEVER": (0.36229, 0.36198, 0.36064),
    "DBPedia": (0.44826, 0.44946, 0.43716),
    "FEVER": (0.87224, 0.87253, 0.86600),
    "FiQA2018": (0.41671, 0.41507, 0.41258),
    "HotpotQA": (0.69174, 0.69112, 0.68013),
    "MSMARCO": (0.41249, 0.41314, 0.40598),
    "NFCorpus": (0.35799, 0.35742, 0.35728),
    "NQ": (0.61669, 0.61711, 0.61018),
    "QuoraRetrieval": (0.87170, 0.87201, 0.86837),
    "SCIDOCS": (0.21235, 0.21240, 0.20874),
    "SciFact": (0.69811, 0.69802, 0.69408),
    "TRECCOVID": (0.83394, 0.83508, 0.83281),
    "Touche2020": (0.31368, 0.31754, 0.31245),
}

# Rows of MTEB's leaderboard, in percent; `parameters` in millions, empty where not published;
# `mean` as the leaderboard has it. Source: boards_data/en/data_tasks/Retrieval/default.jsonl of
# https://github.com/embeddings-benchmark/leaderboard at commit
# ab2ea305be0b9b29f26e1a28fa58730a4f5a6ff5.
LEADERBOARD = Path(__file__).with_name("published.csv")


def _short(model: str) -> str:
    return model.rpartition("/")[2].removeprefix("snowflake-")


with LEADERBOARD.open(encoding="utf-8", newline="") as _file:
    _ROWS = {_short(row["model"]): row for row in csv.DictReader(_file)}

# Model -> score -> nDCG@10: the family, then its peers.
BY_TASK: dict[str, dict[str, float]] = {
    model: {score: round(float(row[score]) / 100, 4) for score in RETRIEVAL_15}
    for model, row in _ROWS.items()
} | {
    f"arctic-embed-m-v1.5, 256 x {kind}": {
        score: values[column] for score, values in _M_V1_5_256.items()
    }
    for column, kind in enumerate(("float32", "int8", "int4"))
}

# Model -> millions of parameters; None: not published.
SIZES: dict[str, int | None] = dict.fromkeys(BY_TASK, 109) | {
    model: int(row["parameters"]) if row["parameters"] else None for model, row in _ROWS.items()
}

# Model -> mean of the 15. Cards and the README of Arctic-Embed have 54.90 for m too, 55.6 for
# l-v2.0, 52.31 for gte-base and 53.25 for nomic-embed-text-v1.5. The last two are of that README
# only.
MEANS: dict[str, float] = {
    model: round(float(row["mean"]) / 100, 4) for model, row in _ROWS.items()
} | {"GIST-all-MiniLM-L6-v2": 0.4512, "Gecko": 0.5570}
