import pytest
from safetensors.numpy import save_file

from arcticjax.models.hf_mapping import to_hf_state
from tests.models.folders import SPEC, random_params, tokenizer_json, write


@pytest.fixture
def folder(tmp_path):
    """A complete tiny sentence-transformers folder: cls, prompts, 48 tokens."""
    root = tmp_path / "model"
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
