"""The step on queries with hard negatives: against the definition, on any number of devices."""

from collections import Counter

import jax
import numpy as np
import pytest

from arcticjax.config.negatives import NegativesConfig
from arcticjax.config.schema import SourceConfig
from arcticjax.data import catalog, layout, list_sources
from arcticjax.data.draw import Draw
from arcticjax.data.list_pipeline import ListBatchBuilder
from arcticjax.data.list_views import ListView
from arcticjax.data.policy import Policy
from arcticjax.models.encoder import Encoder
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.hlo import collectives
from arcticjax.step import train as steps
from arcticjax.step.objective import Distillation, Objective
from tests import tiny
from tests.data import candidate_files
from tests.step import plain
from tests.step.parts import make_parts, placed

pytestmark = pytest.mark.usefixtures("quick_compiler")

BATCH, POSITIVES, NEGATIVES, TEMPERATURE = 16, 2, 3, 0.2
KL = Distillation("kl", 0.25, 0.3)
MARGINS = Distillation("margin_mse", 0.75)
CASES = {
    "own": Objective(TEMPERATURE, in_batch_negatives=False),
    "shared": Objective(TEMPERATURE, tile=8),
    "own, kl": Objective(TEMPERATURE, in_batch_negatives=False, distillation=KL),
    "shared, margins": Objective(TEMPERATURE, tile=8, distillation=MARGINS),
}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    tokenizer = TextTokenizer.from_file(tiny.tokenizer_folder(folder / "tokenizer"))
    file = candidate_files.jsonl(folder / "a.jsonl", candidate_files.records(0, 48))
    source = SourceConfig(
        name="a",
        path=str(file),
        document="pos",
        negatives=["neg"],
        scores=["pos_scores", "neg_scores"],
    )
    found = list_sources.open_source(
        source, folder, tokenizer, lambda one: catalog.open_cached(one, folder, tokenizer)
    )
    policy = Policy.from_config(NegativesConfig(count=NEGATIVES, minimum=1), POSITIVES, 0)
    return ListView("a", [found], policy)


@pytest.fixture(scope="module")
def params():
    return tiny.weights()


@pytest.fixture(scope="module")
def ran(view, params):
    """(case, devices) -> metrics, gradient and collectives of the step of one batch, made once."""
    known = {}

    def one(case, devices):
        if (case, devices) not in known:
            known[case, devices] = _run(view, params, CASES[case], devices)
        return known[case, devices]

    return one


def _builder(view, objective, devices):
    shapes = layout.Shapes(
        devices, BATCH // devices, 32, 2, tiny.QUERY.longest, tiny.DOCUMENT.longest,
        POSITIVES, NEGATIVES,
    )  # fmt: skip
    return ListBatchBuilder(
        [view], Draw([len(view)], BATCH, 3), shapes, tiny.QUERY, tiny.DOCUMENT, range(devices),
        total_steps=4, shared=objective.in_batch_negatives,
        taught=objective.distillation is not None,
    )  # fmt: skip


def _run(view, params, objective, devices):
    builder, mesh = _builder(view, objective, devices), meshes.make_mesh(devices)
    with jax.set_mesh(mesh):
        parts, kept = make_parts(
            Encoder(tiny.SPEC), builder, mesh, objective=objective, passes="two"
        )
        arrays = placed(params, objective, parts[-1])
        batch = meshes.host_to_global(mesh, builder(1).arrays)
        compiled = jax.jit(steps.make_gradient(*parts)).lower(arrays, kept, batch).compile()
        pieces, _, metrics = compiled(arrays, kept, batch)
    gradient = [
        np.asarray(piece)[:, : leaf.size // piece.shape[0]].reshape(-1)
        for piece, leaf in zip(
            jax.tree.leaves(pieces["params"]), jax.tree.leaves(params), strict=True
        )
    ]
    sent = collectives(compiled.as_text())
    return jax.device_get(metrics), np.concatenate(gradient), sent


PLAIN = [pytest.param(case, marks=pytest.mark.slow) for case in ("own", "shared")]


@pytest.mark.parametrize("case", ["own, kl", "shared, margins", *PLAIN])
def test_the_loss_is_its_definition(ran, view, params, case):
    """By default with distillation, which has the plain loss in it."""
    objective = CASES[case]
    drawn = Draw([len(view)], BATCH, 3).at(1)
    expected = _reference(view.select(drawn.records, drawn.epoch, 0.25), view, params, objective,
                          drawn.records)  # fmt: skip
    metrics, _, _ = ran(case, 8)
    assert 0.1 < expected < 10
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("case", ["own, kl", *PLAIN])
def test_eight_devices_give_the_loss_and_gradient_of_one(ran, case):
    (one, gradient_one, _), (many, gradient_many, _) = ran(case, 1), ran(case, 8)
    for name in ("loss", "accuracy", "positive_score", "hardest_negative_score"):
        np.testing.assert_allclose(one[name], many[name], rtol=1e-5, err_msg=name)
    scale = np.abs(gradient_one).max()
    assert scale > 1e-3
    np.testing.assert_allclose(gradient_one, gradient_many, atol=2e-5 * scale)


@pytest.mark.parametrize(("case", "documents"), [("own, kl", 0), ("shared, margins", 1)])
def test_documents_are_sent_only_for_in_batch_negatives(ran, params, case, documents):
    _, _, sent = ran(case, 8)
    count = Counter(one.op for one in sent)
    leaves = len(jax.tree.leaves(params))
    assert not any(one.in_loop for one in sent)
    # Embeddings and groups out, gradients of embeddings back; every parameter's gradient once.
    assert count["all-gather"] == 2 * documents
    assert count["reduce-scatter"] == leaves + documents


def _reference(selected, view, params, objective, records):
    """The loss in float64 from whole matrices, by what the documents are."""
    documents = np.unique(selected.documents_BC[selected.documents_BC >= 0])
    place = {number: index for index, number in enumerate(documents.tolist())}
    queries = _embedded(view.query_tokens(records), tiny.QUERY, params)
    texts = _embedded(view.document_tokens(documents), tiny.DOCUMENT, params)
    cosines = queries @ texts.T
    scores = cosines / objective.temperature
    groups = _groups(selected, place)
    terms, taught = [], []
    for query, row in enumerate(selected.documents_BC.tolist()):
        positives = [place[one] for one in row[:POSITIVES] if one >= 0]
        negatives = [place[one] for one in row[POSITIVES:] if one >= 0]
        candidates = positives + negatives
        teacher = selected.scores_BC[query][np.array(row) >= 0].astype(np.float64)
        if objective.in_batch_negatives:
            negatives = [one for one in range(len(documents)) if not groups[query, one]]
        for positive in positives:
            gaps = scores[query, negatives] - scores[query, positive]
            terms.append(np.log1p(np.exp(gaps).sum()))
        if objective.distillation is None:
            continue
        if objective.distillation.kind == "kl":
            target = _softmax(teacher / objective.distillation.teacher_temperature)
            student = _softmax(scores[query, candidates])
            taught.append((target * np.log(target / student)).sum())
        else:
            for a in range(len(positives)):
                for b in range(len(positives), len(candidates)):
                    student = cosines[query, candidates[a]] - cosines[query, candidates[b]]
                    taught.append((student - (teacher[a] - teacher[b])) ** 2)
    if objective.distillation is None:
        return np.mean(terms)
    weight = objective.distillation.weight
    return (1 - weight) * np.mean(terms) + weight * np.mean(taught)


def _groups(selected, place):
    """[query, document]: whether they are connected by known answers."""
    count = len(selected.query_ids_B)
    answers = np.zeros((count, len(place)), bool)
    for query, known in enumerate(selected.known_BP.tolist()):
        answers[query, [place[one] for one in known if one in place]] = True
    for _ in range(count):
        near = (answers.astype(int) @ answers.T.astype(int)) > 0
        answers = (near.astype(int) @ answers.astype(int)) > 0
    return answers


def _embedded(texts, template, params):
    vectors = _embed(params, *plain.padded(texts, template))
    return np.asarray(vectors, np.float64)[:, 0]


@jax.jit
def _embed(params, tokens, starts, lengths):
    return Encoder(tiny.SPEC).embed(params, tokens, starts, lengths, pooling="mean")


def _softmax(values):
    shares = np.exp(values - values.max())
    return shares / shares.sum()
