"""The certificate: right folders pass, wrong ones are refused and moved away."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError
from arcticjax.export import certificate as certificate_module
from arcticjax.export import layers, readers
from arcticjax.export.certificate import certify, cut, import_certified, write_certified
from arcticjax.export.folder import Storage, write_folder
from arcticjax.export.probes import PROBES, Probe, probe_tokens, probe_vectors, probes_for
from arcticjax.export.source import Source, make_embedder, open_source
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import POOLINGS, ModelSpec, Rotary, Window, parameter_shapes
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel.mesh import local_mesh, make_mesh
from tests import tiny
from tests.torch_here import torch_here

pytestmark = pytest.mark.usefixtures("quick_compiler")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SPEC = ModelSpec(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=64)
CONTRACT = TextContract("query: ", "", 32, 32, "mean")


def random_params(seed=0, spec=SPEC):
    generator = np.random.default_rng(seed)
    return unflatten_dict(
        {
            path: generator.normal(scale=0.3, size=shape).astype(np.float32)
            for path, shape in parameter_shapes(spec).items()
        },
        sep="/",
    )


def calm_params():
    """Weights that bfloat16 changes as little as it does trained ones."""
    params = random_params()
    params["layers"] = jax.tree.map(lambda leaf: leaf * np.float32(0.2), params["layers"])
    return params


def embedder_of(params):
    source = Source(SPEC, params, CONTRACT, resolve(MINILM), "params")
    return make_embedder(source, local_mesh())


def one_device(folder):
    return make_embedder(open_source(folder), local_mesh())


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A right folder and what embeds as it should."""
    folder = write_folder(
        tmp_path_factory.mktemp("right") / "model",
        spec=SPEC,
        params=random_params(),
        tokenizer_folder=resolve(MINILM),
        contract=CONTRACT,
    )
    return folder, one_device(folder).encode


@pytest.fixture
def own_reader(monkeypatch):
    """As where sentence-transformers is not installed."""
    monkeypatch.setattr(readers, "torch_vectors", lambda folders, probes: None)


def options(**changes):
    return {
        "spec": SPEC,
        "params": random_params(),
        "tokenizer_folder": resolve(MINILM),
        "contract": CONTRACT,
        **changes,
    }


def test_published_weights_give_the_published_vectors(tmp_path, monkeypatch):
    """Exported unchanged, MiniLM in sentence-transformers is MiniLM in sentence-transformers, and
    ours."""
    source = load_pretrained(MINILM)
    real = readers.torch_vectors
    seen = {}

    def both(folders, probes):
        # One process for both: torch takes long to import.
        version, vectors = real([*folders, source.folder], probes)
        seen["exported"], seen["published"] = (one.exact for one in vectors)
        return version, vectors[:1]

    monkeypatch.setattr(readers, "torch_vectors", both)
    output = tmp_path / "out"
    certificate = write_certified(
        output,
        spec=source.spec,
        params=source.params,
        tokenizer_folder=source.tokenizer_file.parent,
        contract=source.contract,
        embed=one_device(source.folder).encode,
    )
    assert seen["exported"].shape == (len(PROBES), 384)
    assert np.abs(seen["exported"] - seen["published"]).max() <= 1e-6
    assert certificate.passed and certificate.max_difference <= 1e-5
    assert certificate.reader.startswith("sentence-transformers ")
    assert set(certificate.probes) == {probe.name for probe in PROBES}
    stored = json.loads((output / "certificate.json").read_text())
    assert stored["passed"] is True and stored["max_difference"] == certificate.max_difference


def test_without_sentence_transformers_our_own_reader_is_named(right, own_reader):
    folder, embed = right
    certificate = certify(folder, embed)
    assert certificate.reader == "arcticjax" and certificate.max_difference == 0.0
    assert any("not installed" in note for note in certificate.notes)
    (folder / "certificate.json").unlink()


def wrong_element(vectors):
    vectors[0, 0] += 2e-5


def not_a_number(vectors):
    vectors[-1, 3] = np.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(wrong_element, "differ by up to 2"), (not_a_number, "differ by up to nan")],
)
def test_one_wrong_element_refuses_the_folder(tmp_path, right, own_reader, spoil, message):
    _, embed = right

    def spoiled(texts, side):
        vectors = np.array(embed(texts, side))
        if side == "document":
            spoil(vectors)
        return vectors

    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match=message):
        write_certified(output, **options(embed=spoiled))
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    stored = json.loads((tmp_path / "out.rejected" / "certificate.json").read_text())
    assert stored["passed"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": TextContract("", "", 32, 32, "mean")},
        {"contract": TextContract("query: ", "query: ", 32, 32, "mean")},
        {"contract": TextContract("query: ", "", 32, 32, "cls")},
        {"contract": TextContract("query: ", "", 31, 31, "mean")},
        {"params": random_params(seed=1)},
    ],
    ids=["query prompt", "document prompt", "pooling", "length", "weights"],
)
def test_another_contract_or_model_is_refused(tmp_path, right, own_reader, changes):
    _, embed = right
    with pytest.raises(CheckpointError, match="not the trained encoder"):
        write_certified(tmp_path / "out", **options(embed=embed, **changes))
    assert not (tmp_path / "out").exists()


def test_a_single_changed_weight_is_seen(tmp_path, right, own_reader):
    _, embed = right
    params = random_params()
    flatten_dict(params, sep="/")["layers/attention/value/bias"][1, 5] += 0.01
    with pytest.raises(CheckpointError, match="vectors differ"):
        write_certified(tmp_path / "out", **options(embed=embed, params=params))


def test_a_rejected_export_leaves_the_earlier_good_one(tmp_path, right, own_reader):
    _, embed = right
    output = tmp_path / "out"
    write_certified(output, **options(embed=embed))
    with pytest.raises(CheckpointError):
        write_certified(output, **options(embed=embed, params=random_params(seed=1)))
    assert certify(output, embed).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rejected"]


def test_certify_alone_moves_a_wrong_folder_away(tmp_path, right, own_reader):
    _, embed = right
    folder = write_folder(tmp_path / "out", **options(params=random_params(seed=2)))
    with pytest.raises(CheckpointError, match=r"moved to .*out\.rejected"):
        certify(folder, embed)
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]


def test_another_width_is_refused(tmp_path, right, own_reader):
    _, embed = right
    folder = write_folder(tmp_path / "out", **options())
    with pytest.raises(CheckpointError, match=r"shape \(\d+, 16\), expected \(\d+, 15\)"):
        certify(folder, lambda texts, side: embed(texts, side)[:, :15])


def test_a_reader_that_fails_refuses_the_folder(tmp_path, right, monkeypatch):
    _, embed = right
    script = tmp_path / "torch_vectors.py"
    script.write_text("raise SystemExit('cannot load this model')")
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "readers.py"))
    with pytest.raises(CheckpointError, match="does not load it: cannot load this model"):
        write_certified(tmp_path / "out", **options(embed=embed, reader="sentence-transformers"))
    # A broken installation is no fault of the folder.
    script.write_text("import sys; sys.exit(3)")
    certificate = write_certified(tmp_path / "out", **options(embed=embed))
    assert certificate.reader == "arcticjax"


LONG = {
    # A window of 40 tokens to each side, and 24 trained positions.
    "modernbert": {
        "type_vocab_size": 0,
        "rotary": Rotary(160_000.0),
        "window": Window(reach=40, every=2, theta=10_000.0),
    },
    "nomic_bert": {"rotary": Rotary(1000.0, factor=2.0, trained_positions=24)},
}


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("modernbert", {"window": Window(reach=41, every=2, theta=10_000.0)}),
        ("nomic_bert", {"rotary": Rotary(1000.0, factor=2.5, trained_positions=24)}),
    ],
)
def test_what_is_wrong_only_in_long_texts_is_seen(tmp_path, own_reader, family, wrong):
    spec = dataclasses.replace(tiny.SPEC, family=family, **LONG[family])
    contract = TextContract("", "", 16, 64, "mean")
    folder = tiny.tokenizer_folder(tmp_path / "tokenizer")
    params = random_params(spec=spec)
    source = Source(spec, params, contract, folder, "params")
    with pytest.raises(CheckpointError, match=r"differ by up to .*'truncated document'"):
        write_certified(
            tmp_path / "wrong",
            spec=dataclasses.replace(spec, **wrong),
            params=params,
            tokenizer_folder=folder,
            contract=contract,
            embed=make_embedder(source, local_mesh()).encode,
        )
    stored = json.loads((tmp_path / "wrong.rejected" / "certificate.json").read_text())
    errors = stored["probes"]
    assert errors.pop("truncated document") > 1e-5 >= max(errors.values())


def test_the_first_layer_that_differs_is_named(tmp_path, right, own_reader, monkeypatch):
    """A folder with another bias in its second layer, and one with other embeddings."""
    _, embed = right
    real = certificate_module.write_folder

    def spoiling(part):
        def spoiled(output, *, params, **rest):
            params = jax.tree.map(np.array, params)
            flatten_dict(params, sep="/")[part].flat[-1] += 0.05
            return real(output, params=params, **rest)

        monkeypatch.setattr(certificate_module, "write_folder", spoiled)

    spoiling("layers/mlp/down/bias")
    with pytest.raises(CheckpointError, match=r"first to differ is layer 2 \(hidden states by up"):
        write_certified(tmp_path / "out", **options(embed=embed))
    spoiling("embeddings/type")  # of the second type, which no text has
    write_certified(tmp_path / "good", **options(embed=embed))
    spoiling("embeddings/norm/bias")
    with pytest.raises(CheckpointError, match="first to differ is the embeddings"):
        write_certified(tmp_path / "out", **options(embed=embed))


def test_where_no_layer_differs_the_rest_is_blamed(tmp_path, right, own_reader):
    _, embed = right
    contract = TextContract("", "", 32, 32, "mean")
    with pytest.raises(CheckpointError, match="no layer differs, so prompt"):
        write_certified(tmp_path / "out", **options(embed=embed, contract=contract))


def test_layers_agree_with_those_of_transformers(right):
    """Or every refusal would name a layer that is right."""
    folder, _ = right
    source = open_source(folder)
    tokens = probe_tokens(CONTRACT, TextTokenizer.from_file(folder), PROBES[3])
    with torch_here():
        theirs = readers.torch_states(folder, tokens)
    assert theirs is not None and len(theirs) == 3
    ours = list(layers.states(source.spec, source.params, tokens))
    assert layers.first_difference(ours, theirs) is None
    theirs[2][1, 5] += 0.01
    assert layers.first_difference(ours, theirs) == "layer 2 (hidden states by up to 0.01)"
    theirs[0][0, 0] = np.nan
    assert layers.first_difference(ours, theirs) == "the embeddings (hidden states by up to nan)"


def test_every_pooling_and_texts_at_the_limit_agree_with_sentence_transformers(tmp_path):
    """Text to vector, prompt included. Of 32 tokens two are special ones and, before a query, two
    the prompt's: texts that fill the rest, fall one short of it or go one beyond."""
    words = "one two three four five six seven eight nine ten".split() * 4
    probes = [
        Probe(f"{side} of {count} tokens", side, " ".join(words[: count - used]))
        for side, used in (("query", 4), ("document", 2))
        for count in (31, 32, 33)
    ] + [probe for probe in PROBES if probe.name in ("empty query", "document")]
    tokenizer = TextTokenizer.from_file(resolve(MINILM))
    sizes = [probe_tokens(CONTRACT, tokenizer, probe).size for probe in probes[:6]]
    assert sizes == [31, 32, 32] * 2
    folders = [
        write_folder(
            tmp_path / pooling,
            **options(contract=dataclasses.replace(CONTRACT, pooling=pooling)),
        )
        for pooling in POOLINGS
    ]
    with torch_here():
        found = readers.torch_vectors(folders, probes)
    assert found is not None
    ours = [readers._own_vectors(folder, probes).exact for folder in folders]
    for own, theirs in zip(ours, found[1], strict=True):
        np.testing.assert_allclose(own, theirs.exact, atol=1e-5)
    # Else agreement would say little: what is cut off does not count, what is not does, and so
    # does the pooling.
    for vectors in ours:
        np.testing.assert_array_equal(vectors[1], vectors[2])
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(ours, 2))


def test_a_bfloat16_truncated_folder_in_shards(tmp_path):
    """What is stored is exact, what is computed in bfloat16 near the encoder as trained."""
    storage = Storage(dtype="bfloat16", shard_bytes=200_000, truncate_dim=6)
    params = calm_params()
    stored = storage.stored(params)
    trained = embedder_of(params)
    with torch_here():
        certificate = write_certified(
            tmp_path / "out",
            **options(embed=trained.encode, params=params),
            embed_stored=embedder_of(stored).encode,
            storage=storage,
        )
    assert certificate.passed and certificate.reader.startswith("sentence-transformers ")
    assert certificate.dimension == 6 and certificate.dtype == "bfloat16"
    assert certificate.max_difference <= 1e-5 < certificate.as_loaded_difference
    assert certificate.as_loaded_difference <= certificate.as_loaded_tolerance == 1e-2
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    # Our own loader gives the same, cut and with the weights as stored.
    loaded = one_device(tmp_path / "out")
    expected = cut(embedder_of(stored).encode(["river"]), 6)
    np.testing.assert_allclose(loaded.encode(["river"]), expected, atol=1e-6)
    assert loaded.encode(["river"], dimension=16).shape == (1, 16)


def test_weights_rounded_too_far_are_refused(tmp_path, right, own_reader, monkeypatch):
    _, embed = right
    monkeypatch.setattr(certificate_module, "BFLOAT16_TOLERANCE", 1e-6)
    storage = Storage(dtype="bfloat16")
    stored = embedder_of(storage.stored(random_params()))
    with pytest.raises(CheckpointError, match=r"lower precision of the folder .* keep float32"):
        write_certified(
            tmp_path / "out",
            **options(embed=embed),
            embed_stored=stored.encode,
            storage=storage,
        )
    with pytest.raises(ValueError, match="embed_stored"):
        write_certified(tmp_path / "out", **options(embed=embed), storage=storage)


def test_the_card_holds_the_certificate(tmp_path, right, own_reader):
    _, embed = right
    certificate = write_certified(tmp_path / "out", **options(embed=embed))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Certificate" in card and "by arcticjax" in card
    assert all(f"| {name} |" in card for name in certificate.probes)


def test_an_imported_folder_gives_what_sentence_transformers_gave(tmp_path, right, monkeypatch):
    folder, embed = right
    probes = probes_for(CONTRACT, TextTokenizer.from_file(folder))
    theirs = readers.FolderVectors(probe_vectors(embed, probes))
    monkeypatch.setattr(readers, "torch_vectors", lambda *_: ("sentence-transformers 9", [theirs]))
    source = open_source(folder)
    certificate = import_certified(tmp_path / "in", source, folder)
    assert certificate.reader == "arcticjax" and certificate.max_difference <= 1e-6
    assert "as sentence-transformers 9 reads it" in certificate.notes[0]
    assert load_pretrained(tmp_path / "in").contract == CONTRACT

    theirs.exact[2, 0] += 1e-3
    monkeypatch.setattr(readers, "torch_states", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"differ by up to 0\.001 .* no layer differs"):
        import_certified(tmp_path / "wrong", source, folder)
    assert not (tmp_path / "wrong").exists()
    monkeypatch.setattr(readers, "torch_vectors", lambda *_: None)
    with pytest.raises(CheckpointError, match="not installed"):
        import_certified(tmp_path / "wrong", source, folder)


def test_probes_reach_what_they_claim():
    tokenizer = TextTokenizer.from_file(resolve(MINILM))
    ids = {probe.name: tokenizer.encode([probe.text])[0] for probe in PROBES}
    assert ids["empty document"].size == ids["empty query"].size == 0
    assert ids["one token"].size == 1
    assert ids["truncated document"].size > 8192 and ids["truncated query"].size > 8192
    assert {probe.name for probe in PROBES if probe.alone} == {
        *("truncated document", "truncated query")
    }
    assert {102, 103} <= set(ids["special tokens as text"].tolist())
    assert any(ord(letter) > 0xFFFF for probe in PROBES for letter in probe.text)
    assert {probe.side for probe in PROBES} == {"query", "document"}
    assert len({probe.name for probe in PROBES}) == len(PROBES)


def test_a_side_cut_shorter_in_training_is_noted_not_compared(tmp_path, own_reader):
    contract = TextContract("query: ", "", 8, 32, "mean")
    tokenizer = TextTokenizer.from_file(resolve(MINILM))
    left_out = {probe.name for probe in set(PROBES) - set(probes_for(contract, tokenizer))}
    assert left_out == {"truncated query", "accents", "query"}
    source = write_folder(tmp_path / "source", **options(contract=contract))
    embed = one_device(source).encode
    certificate = write_certified(tmp_path / "out", **options(contract=contract, embed=embed))
    assert any("cut to 8 tokens" in note for note in certificate.notes)


def test_probe_vectors_keep_the_order_of_probes():
    def embed(texts, side):
        return np.array([[len(text), side == "query"] for text in texts], np.float32)

    found = probe_vectors(embed, PROBES)
    assert found[:, 0].tolist() == [len(probe.text) for probe in PROBES]
    assert found[:, 1].tolist() == [float(probe.side == "query") for probe in PROBES]


def test_a_folder_is_certified_under_the_mesh_of_a_run(tmp_path):
    """As at the end of training on eight devices where sentence-transformers is not installed."""
    folder = tiny.model_folder(tmp_path / "model")
    mesh = make_mesh()
    assert mesh.devices.size == 8
    with jax.set_mesh(mesh):
        embedder = make_embedder(open_source(str(folder)))
        found = certify(folder, embedder.encode, reader="arcticjax")
    assert found.passed and found.reader == "arcticjax"
