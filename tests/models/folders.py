"""A tiny model's folder, and what to change in it."""

import json

import numpy as np
from flax.traverse_util import unflatten_dict

from arcticjax.models.spec import ModelSpec, parameter_shapes

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SPEC = ModelSpec(
    vocab_size=40, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16, max_positions=64
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123)), "query", ":"]


def tokenizer_json(words=WORDS, lowercase=True):
    """A tiny WordPiece tokenizer.json of BERT's kind."""
    ids = {word: index for index, word in enumerate(words)}
    special = [
        {
            "id": ids[word],
            "content": word,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for word in words[:5]
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path, **changes):
    write(path, {**json.loads(path.read_text()), **changes})


def random_params(spec=SPEC, seed=0):
    generator = np.random.default_rng(seed)
    flat = {
        path: generator.normal(size=shape).astype(np.float32)
        for path, shape in parameter_shapes(spec).items()
    }
    return unflatten_dict(flat, sep="/")
