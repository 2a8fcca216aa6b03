"""A tiny model's folder, and what to change in it."""

import json

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from arcticjax.models.hf_mapping import to_hf_state
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


def complete(root):
    """Writes a whole tiny sentence-transformers folder: cls, prompts, 48 tokens."""
    write(root / "config.json", SPEC.to_hf())
    write(root / "tokenizer.json", tokenizer_json())
    kinds = ("Transformer", "Pooling", "Normalize")
    write(
        root / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(
                zip(kinds, ("", "1_Pooling", "2_Normalize"), strict=True)
            )
        ],
    )
    write(
        root / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 8, "pooling_mode_cls_token": True},
    )
    write(root / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    write(
        root / "config_sentence_transformers.json",
        {"prompts": {"query": "query: ", "document": ""}},
    )
    save_file(to_hf_state(SPEC, random_params()), root / "model.safetensors")
    return root
