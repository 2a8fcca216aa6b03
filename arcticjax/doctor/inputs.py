"""What a config names: the model, its tokenizer, the data and the retrieval tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etils import epath

from arcticjax.config import RunConfig
from arcticjax.data import adapters, buckets, list_sources, stored, training_sets
from arcticjax.data.candidates import open_candidates
from arcticjax.doctor.findings import Finding
from arcticjax.errors import ConfigError, DataError
from arcticjax.models.pretrained import contract_options, describe_folder, open_tokenizer
from arcticjax.models.resolve import resolve
from arcticjax.models.safe_weights import weight_files
from arcticjax.models.spec import PRESETS, ModelSpec
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.scoring import beir

# Parameters and the two moments of AdamW, float32.
_STATE_BYTES = 12


@dataclass(frozen=True)
class Model:
    """What a config's model is, without its weights."""

    spec: ModelSpec
    tokenizer: TextTokenizer
    text: str

    @property
    def loading_bytes(self) -> int:
        """Host memory while the weights are read and laid out."""
        return 2 * 4 * self.spec.parameter_count()

    def checkpoint_bytes(self, keep: int) -> int:
        """Disk that `keep` checkpoints and the one being written take."""
        return (keep + 1) * _STATE_BYTES * self.spec.parameter_count()


def model(config: RunConfig) -> Model:
    """Resolves the model and its tokenizer and sees that they fit each other and the lengths."""
    if config.model.preset is not None:
        spec, source = PRESETS[config.model.preset], f"preset {config.model.preset}"
        longest = max(config.data.query_length, config.data.document_length)
        if longest > spec.max_positions:
            raise ConfigError(
                f"data.query_length / data.document_length: {longest} tokens, but {source} takes "
                f"{spec.max_positions} at most"
            )
        if config.model.tokenizer is None:
            raise ConfigError(f"model.tokenizer: {source} needs one; name a tokenizer.json")
        tokenizer = TextTokenizer.from_file(Path(config.model.tokenizer))
        if tokenizer.vocab_size > spec.vocab_size:
            raise ConfigError(
                f"model.tokenizer: {tokenizer.file} has {tokenizer.vocab_size} tokens, but "
                f"{source} has a token table of {spec.vocab_size} rows: they do not belong together"
            )
    else:
        name = config.model.init or ""
        folder = resolve(name)
        described = describe_folder(
            folder, name, keep_layers=config.model.keep_layers, **contract_options(config)
        )
        spec, source = described.spec, name
        encoder = described.settings.encoder_folder
        files = weight_files(encoder)
        if not all(file.is_file() for file in files):
            raise ConfigError(f"{name}: weights are missing from {encoder}; fetch the model again")
        tokenizer = open_tokenizer(encoder, spec, config.model.tokenizer)
    return Model(
        spec,
        tokenizer,
        f"{source}: {spec.num_layers} layers of {spec.hidden_size}, "
        f"{spec.parameter_count():,} parameters; tokenizer of {tokenizer.vocab_size} tokens",
    )


def data(config: RunConfig, tokenizer: TextTokenizer) -> Finding | str:
    """Opens every source: stored ones must be made with this tokenizer, of plain ones the first
    pair is read and tokenised. Of hard negatives the first record's columns must be there, mined
    candidates finished, and published folders in place. Buckets are listed."""
    seen, unread = [], []
    for source in config.data.sources:
        path = Path(source.path).expanduser()
        if source.candidates is not None:
            open_candidates(source.candidates).group_of(source.name)
        corpus = adapters.corpus_of(source)
        if corpus is not None and not corpus.path.startswith((adapters.HUB, adapters.TFDS)):
            if stored.has_own_manifest(Path(corpus.path).expanduser()):
                stored.open_source(Path(corpus.path).expanduser())
            else:
                next(adapters.read_pairs(corpus))
        if source.path.startswith((adapters.HUB, adapters.TFDS)):
            unread.append(source.name)
        elif buckets.holds(source):
            seen.append(f"{source.name} {len(buckets.objects(source))} object(s) of a bucket")
        elif stored.has_own_manifest(path):
            found = stored.open_source(path)
            if found.manifest["tokenizer"]["sha256"] != tokenizer.sha256:
                raise DataError(
                    f"source {source.name!r}, {path}: tokenised with another tokenizer than the "
                    "model's; prepare it again or choose the model it was made for"
                )
            seen.append(f"{source.name} {len(found):,} pairs")
        elif training_sets.knows(source.path):
            seen.append(f"{source.name} {len(training_sets.files(source))} file(s)")
        elif source.negatives:
            next(adapters.read_records(source, list_sources.columns(source)))
            seen.append(f"{source.name} {len(adapters.source_files(source))} file(s)")
        else:
            files = adapters.source_files(source)
            tokenizer.encode(list(next(adapters.read_pairs(source))))
            seen.append(f"{source.name} {len(files)} file(s)")
    if config.data.docstrings is not None:
        seen.append("docstrings of installed packages")
    if unread:
        return Finding(
            "data",
            "warn",
            f"{', '.join(seen) or 'nothing read'}; not looked at: {', '.join(unread)}",
            "sources of the hub and of TFDS are fetched when the run starts",
        )
    return ", ".join(seen)


def tasks(config: RunConfig) -> str:
    """Whether every retrieval task in a folder has its three files."""
    folders = [name for name in config.evaluation.tasks if name.startswith("beir:")]
    for name in folders:
        folder = epath.Path(name.removeprefix("beir:")).expanduser()
        for names in (beir.CORPUS_NAMES, beir.QUERIES_NAMES, beir.QRELS_NAMES):
            if not any((folder / one).exists() for one in names):
                raise DataError(
                    f"evaluation.tasks: {name} has none of {', '.join(names)}; a task is a BEIR "
                    "folder with corpus.jsonl, queries.jsonl and qrels"
                )
    others = [name for name in config.evaluation.tasks if name not in folders]
    return ", ".join([*folders, *others]) or "none"
