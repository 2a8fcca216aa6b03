"""Small stand-ins shared by tests: a tiny encoder, its tokenizer, sources, a task, a config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import tokenizers
import yaml

from arcticjax.config import TextContract
from arcticjax.data import assemble, layout, pipeline
from arcticjax.data.draw import Draw
from arcticjax.export.folder import write_folder
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import ModelSpec
from arcticjax.scoring.beir import Task, write_task

SPEC = ModelSpec(
    vocab_size=120,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=64,
    max_positions=64,
    type_vocab_size=2,
    layer_norm_epsilon=1e-12,
    initializer_range=0.2,
    pooling="mean",
)
QUERY = assemble.Template(1, np.array([5]), 2, 12)
DOCUMENT = assemble.Template(1, np.array([], int), 2, 32)


@dataclass
class MemoryView:
    """A source of random texts, with the interface of `catalog.SourceView`."""

    name: str
    queries: list[np.ndarray]
    documents: list[np.ndarray]
    query_id: np.ndarray
    document_id: np.ndarray
    weight: float | None = None

    def __len__(self):
        return len(self.queries)

    def query_lengths(self, records):
        return np.array([len(self.queries[r]) for r in records])

    def document_lengths(self, records):
        return np.array([len(self.documents[r]) for r in records])

    def query_ids(self, records):
        return self.query_id[records]

    def document_ids(self, records):
        return self.document_id[records]

    def read(self, records):
        return [self.queries[r] for r in records], [self.documents[r] for r in records]


def memory_view(
    name: str, seed: int, records: int = 96, *, longest: int = 40, shared: float = 0.3
) -> MemoryView:
    """Random texts over 100 tokens; a share of the documents, and some queries, repeat others."""
    random = np.random.default_rng(seed)

    def text(most: int) -> np.ndarray:
        return random.integers(10, 110, random.integers(0, most)).astype(np.int32)

    queries = [text(14) for _ in range(records)]
    documents = [text(longest) for _ in range(records)]
    query_id = np.arange(records, dtype=np.uint64)
    document_id = np.arange(records, dtype=np.uint64)
    for record in range(1, records):
        if random.random() < shared:
            other = int(random.integers(0, record))
            documents[record], document_id[record] = documents[other], document_id[other]
        if random.random() < shared / 4:
            other = int(random.integers(0, record))
            queries[record], query_id[record] = queries[other], query_id[other]
    return MemoryView(name, queries, documents, query_id, document_id)


def builder(
    devices: int = 1,
    *,
    batch: int = 32,
    rows: int = 2,
    row_length: int = 32,
    local=None,
    seed: int = 3,
    views=None,
) -> pipeline.BatchBuilder:
    """Batches of two sources of unlike lengths, for `devices` devices."""
    views = views or [memory_view("long", 0), memory_view("short", 1, longest=8)]
    shapes = layout.Shapes(
        devices, batch // devices, row_length, rows, QUERY.longest, DOCUMENT.longest
    )
    draw = Draw([len(view) for view in views], batch, seed)
    return pipeline.BatchBuilder(views, draw, shapes, QUERY, DOCUMENT, local or range(devices))


WORDS = (
    "river stone cloud ember violin harbour lantern meadow copper thistle falcon glacier orchard "
    "pepper quartz saddle timber velvet walnut zephyr anchor basil cinder drift elm fern grove "
    "hazel iris jasper kelp linen marble nectar opal pine quill rust sage thorn umber vine willow"
).split()


def tokenizer_folder(folder: Path, extra: int = 0) -> Path:
    """A word-level BERT-like tokenizer over WORDS and `extra` more tokens, as Hugging Face keeps
    it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *(f"extra{n}" for n in range(extra))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(vocabulary[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def weights(spec: ModelSpec = SPEC, seed: int = 0):
    """Random ones, the caller's own to change."""
    return jax.tree.map(np.copy, _weights(spec, seed))


@cache
def _weights(spec: ModelSpec, seed: int):
    # Compiled as a whole: operation by operation it takes seconds.
    return jax.device_get(jax.jit(Encoder(spec).init)(jax.random.key(seed)))


def model_folder(
    folder: Path, *, pooling: str = "mean", seed: int = 0, spec: ModelSpec = SPEC
) -> Path:
    """A tiny encoder of random weights as a sentence-transformers folder."""
    tokenizer_folder(folder.with_name(folder.name + ".tokenizer"))
    params = weights(spec, seed)
    return write_folder(
        folder,
        spec=spec,
        params=params,
        tokenizer_folder=folder.with_name(folder.name + ".tokenizer"),
        contract=TextContract("", "", 16, 32, pooling),
    )


def pairs(seed: int, count: int, longest: int = 24) -> list[tuple[str, str]]:
    """Distinct pairs of which the query's words occur in the document, so that there is something
    to learn."""
    random = np.random.default_rng(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        document = random.choice(WORDS, random.integers(5, longest)).tolist()
        query = " ".join(random.choice(document, 3))
        made.setdefault(query, " ".join(document))
    return list(made.items())


def parquet(path: Path, seed: int, count: int, longest: int = 24) -> Path:
    """A Parquet file of pairs."""
    queries, documents = zip(*pairs(seed, count, longest), strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"query": queries, "document": documents}), path)
    return path


def task_folder(folder: Path, seed: int = 9, count: int = 40) -> Path:
    """A retrieval task in the BEIR layout."""
    made = pairs(seed, count)
    ids = [str(n) for n in range(count)]
    return write_task(
        folder,
        Task(
            folder.name,
            [f"d{n}" for n in ids],
            [document for _, document in made],
            [f"q{n}" for n in ids],
            [query for query, _ in made],
            {f"q{n}": {f"d{n}": 1} for n in ids},
        ),
    )


def run_config(folder: Path, **changes: object) -> Path:
    """The YAML file of a tiny run in `folder`; `changes` are fields by dotted path, `None` removes
    one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        model_folder(folder / "model")
        parquet(folder / "a.parquet", 0, 96)
        parquet(folder / "b.parquet", 1, 64, longest=8)
        task_folder(folder / "task")
    config: dict = {
        "run": {"directory": str(folder / "run"), "seed": 3},
        "model": {"init": str(folder / "model")},
        "data": {
            "sources": [
                {"name": "a", "path": str(folder / "a.parquet")},
                {"name": "b", "path": str(folder / "b.parquet")},
            ],
            "query_length": 16,
            "document_length": 32,
        },
        "loss": {"temperature": 0.1, "tile": 8},
        "optimizer": {"learning_rate": 0.002, "warmup_steps": 2},
        "train": {"total_steps": 8, "global_batch": 16, "microbatch": 2},
        "mesh": {"data": 1},
        "checkpoint": {"save_every_steps": 3},
        "evaluation": {"tasks": [f"beir:{folder / 'task'}"]},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        section: dict = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
