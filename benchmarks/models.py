"""The model folder that both sides of a benchmark read."""

from __future__ import annotations

from pathlib import Path


def folder(name: str, documents: list[str], scratch: Path) -> Path:
    """A folder that is there (a path or a hub's name), or for xs, s, m, l that size in `scratch`
    with random weights and a tokenizer made from the documents."""
    from arcticjax.config import TextContract
    from arcticjax.export.folder import write_folder
    from arcticjax.models.encoder import Encoder
    from arcticjax.models.resolve import resolve
    from arcticjax.models.spec import PRESETS

    if name not in PRESETS:
        return resolve(name)
    import jax
    import tokenizers

    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(documents, PRESETS[name].vocab_size)
    start, end = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", end), ("[CLS]", start)
    )
    (scratch / "tokenizer").mkdir()
    tokenizer.save(str(scratch / "tokenizer" / "tokenizer.json"))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.device_get(Encoder(PRESETS[name]).init(jax.random.key(0)))
    return write_folder(
        scratch / name,
        spec=PRESETS[name],
        params=params,
        tokenizer_folder=scratch / "tokenizer",
        contract=TextContract("", "", 32, 256, "cls"),
    )
