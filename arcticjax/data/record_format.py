"""The bytes of a stored source: one tf.train.Example per pair, and the TFDS metadata.

An Example is `Features { map<string, Feature> }` with one `BytesList` value per feature
(tensorflow/core/example/example.proto and feature.proto). Ours always holds the same two features
in the same order, so the places of the token bytes inside a record follow from the two sizes:
reading needs no protobuf walk and no tensorflow.
"""

from __future__ import annotations

import json

import numpy as np

QUERY_FEATURE = "query_tokens"
DOCUMENT_FEATURE = "document_tokens"
# TFDS derives shard names from it; the source's own name is free text and stands in the manifest.
DATASET = "pairs"
SPLIT = "train"

# Field tags, (number << 3) | wire type 2: every field used is length-delimited.
_FIRST = b"\x0a"
_SECOND = b"\x12"


def serialize(query: bytes, document: bytes) -> bytes:
    """A serialised tf.train.Example with the two byte strings, query first."""
    features = _entry(QUERY_FEATURE, query) + _entry(DOCUMENT_FEATURE, document)
    return _FIRST + _varint(len(features)) + features


def places(
    query_sizes: np.ndarray, document_sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the values lie in records that `serialize` wrote.

    Returns (query starts, document starts, record sizes), int64 in bytes, one element a record.
    """
    query_field = _entry_size(QUERY_FEATURE, query_sizes)
    features = query_field + _entry_size(DOCUMENT_FEATURE, document_sizes)
    sizes = 1 + _varint_size(features) + features
    return sizes - features + query_field - query_sizes, sizes - document_sizes, sizes


def shard_name(shard: int, shards: int) -> str:
    """The file name TFDS expects for a shard."""
    return f"{DATASET}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def tfds_metadata(name: str, shard_records: list[int], num_bytes: int) -> dict[str, str]:
    """File name -> text of the two files that `tfds.builder_from_directory` needs."""
    tensor = {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"dtype": "string", "encoding": "none", "shape": {}},
    }
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {DOCUMENT_FEATURE: tensor, QUERY_FEATURE: tensor}},
    }
    info = {
        "name": DATASET,
        "version": "1.0.0",
        "description": f"{name}: token ids of query and document; see manifest.json",
        "disableShuffling": True,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": SPLIT,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(num_bytes),
                "shardLengths": [str(records) for records in shard_records],
            }
        ],
    }
    return {"features.json": to_json(features), "dataset_info.json": to_json(info)}


def to_json(value: object) -> str:
    """Readable JSON with one form per value."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _entry(key: str, value: bytes) -> bytes:
    """One map entry of Features: key -> Feature { bytes_list { value } }."""
    bytes_list = _FIRST + _varint(len(value)) + value
    feature = _FIRST + _varint(len(bytes_list)) + bytes_list
    name = key.encode()
    entry = _FIRST + _varint(len(name)) + name + _SECOND + _varint(len(feature)) + feature
    return _FIRST + _varint(len(entry)) + entry


def _entry_size(key: str, size: np.ndarray) -> np.ndarray:
    """Bytes of `_entry(key, value)` for values of `size` bytes."""
    bytes_list = 1 + _varint_size(size) + size
    feature = 1 + _varint_size(bytes_list) + bytes_list
    entry = 2 + len(key.encode()) + 1 + _varint_size(feature) + feature
    return 1 + _varint_size(entry) + entry


def _varint(value: int) -> bytes:
    """Base-128 variable-length integer of protobuf."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _varint_size(value: np.ndarray) -> np.ndarray:
    """Bytes of `_varint(value)`, up to the 2 GiB that a protobuf message may have."""
    size = np.ones(np.shape(value), np.int64)
    for bits in (7, 14, 21, 28):
        size += value >= (1 << bits)
    return size
