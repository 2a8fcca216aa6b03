"""Batches as the step receives them, against the records they are made of."""

import dataclasses

import numpy as np
import pytest

from arcticjax import errors
from arcticjax.data import layout, pipeline
from arcticjax.data.assemble import Template
from tests import tiny


def texts_of(arrays, device, shapes):
    """Tokens of each place of a device, read back through rows and slots."""
    found = {}
    for m, g, k in np.argwhere(arrays["lengths"][device] > 0):
        start, length = (arrays[name][device, m, g, k] for name in ("starts", "lengths"))
        place = int(arrays["places"][device, m, g, k])
        assert place not in found and place < shapes.texts
        found[place] = arrays["tokens"][device, m, g, start : start + length].tolist()
    return found


@pytest.mark.parametrize("devices", [1, 4])
def test_a_batch_holds_its_records_and_labels_lead_to_their_documents(devices):
    builder = tiny.builder(devices)
    for step in range(6):
        host = builder(step)
        drawn = builder.draw.at(step)
        view = builder.views[drawn.source]
        assert host.source == view.name
        queries, documents = view.read(drawn.records)

        def whole(text, template):
            return [*template.head, *text[: template.longest - template.overhead], template.end_id]

        pairs = sorted(
            (whole(q, tiny.QUERY), whole(d, tiny.DOCUMENT))
            for q, d in zip(queries, documents, strict=True)
        )
        texts = [texts_of(host.arrays, n, builder.shapes) for n in range(devices)]
        b = builder.shapes.pairs
        found = []
        for device in range(devices):
            for row in range(b):
                column = int(host.arrays["positives"][device, row, 0])
                owner, place = divmod(column, b)
                found.append((texts[device][row], texts[owner][b + place]))
                assert (
                    host.arrays["row_groups"][device, row]
                    == host.arrays["column_groups"][owner, place]
                )
        assert sorted(found) == pairs
        distinct = len(set(view.document_ids(drawn.records).tolist()))
        assert sum(place >= b for one in texts for place in one) == distinct


def test_rows_are_filled_in_order():
    host = tiny.builder(2)(0)
    used_NR = (host.arrays["tokens"] != 0).any(-1).reshape(2, -1)
    counts = used_NR.sum(1)
    assert used_NR.tolist() == (np.arange(used_NR.shape[1]) < counts[:, None]).tolist()
    assert host.rows == counts.max() < used_NR.shape[1]


def test_a_process_builds_only_its_devices_and_all_agree():
    whole = tiny.builder(4)(3).arrays
    halves = [tiny.builder(4, local=local)(3).arrays for local in ([0, 1], [2, 3])]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_batches_depend_on_the_step_alone():
    builder = tiny.builder(1)
    straight = list(pipeline.batches(builder, 0, 9, threads=2, prefetch=3))
    resumed = list(pipeline.batches(builder, 5, 9, threads=1, prefetch=1))
    assert [host.step for host in straight] == list(range(9))
    for left, right in zip(straight[5:], resumed, strict=True):
        assert (left.step, left.source) == (right.step, right.source)
        for name, array in left.arrays.items():
            np.testing.assert_array_equal(array, right.arrays[name])


def choose(**changes):
    builder = tiny.builder(1)
    options = {
        "devices": 1,
        "row_length": None,
        "rows": None,
        "hidden_size": 32,
        "intermediate_size": 64,
        "most_tokens": 512,
    }
    return pipeline.choose_shapes(
        builder.views, builder.draw, tiny.QUERY, tiny.DOCUMENT, **options | changes
    )


def test_chosen_shapes_hold_the_longest_text_and_keep_to_the_memory():
    shapes = choose()
    assert shapes.row_length in (32, 64)
    assert shapes.rows * shapes.row_length <= 512


def test_given_shapes_are_kept():
    shapes = choose(row_length=40, rows=3)
    assert (shapes.row_length, shapes.rows, shapes.slots) == (40, 3, 5)


@pytest.mark.parametrize("row_length", [24, 44])
def test_a_row_length_that_does_not_fit_is_refused(row_length):
    with pytest.raises(errors.ConfigError, match=r"data\.row_length"):
        choose(row_length=row_length)


def test_fill_at_64_pairs_a_device_is_at_least_92_percent():
    """Sources of unlike lengths, lengths like those of real text: short answers to whole pages."""
    random = np.random.default_rng(0)
    views = []
    for number, mean in enumerate((12, 40, 90, 200)):
        view = tiny.memory_view(str(number), number, records=640, shared=0.0)
        lengths = np.clip(random.lognormal(np.log(mean), 0.6, 640), 1, 400).astype(int)
        view.documents = [np.full(n, 7, np.int32) for n in lengths]
        view.queries = [np.full(n, 7, np.int32) for n in random.integers(4, 30, 640)]
        views.append(view)
    query = Template(1, np.array([], int), 2, 64)
    document = dataclasses.replace(query, longest=256)
    draw = pipeline.Draw([640] * 4, 64, 0)
    shapes = pipeline.choose_shapes(
        views,
        draw,
        query,
        document,
        devices=1,
        row_length=None,
        rows=None,
        hidden_size=384,
        intermediate_size=1536,
        most_tokens=2048,
    )
    builder = pipeline.BatchBuilder(views, draw, shapes, query, document, [0])
    hosts = [builder(step) for step in range(40)]
    rows = sum(layout.round_up(one.rows, shapes.rows) for one in hosts)
    tokens = sum(int(one.arrays["lengths"].sum()) for one in hosts)
    assert tokens / (rows * shapes.row_length) >= 0.92
    assert isinstance(shapes, layout.Shapes)


def test_rows_are_chosen_for_what_dealing_gives_a_device():
    """Every second pair is long: dealt to two devices each gets 8 long and 8 short ones, which need
    11 rows, whichever pairs come first in the draw."""
    view = tiny.memory_view("mixed", 0, records=32, shared=0.0)
    view.queries = [np.full(1, 7, np.int32) for _ in range(32)]
    view.documents = [np.full(60 if n % 2 else 1, 7, np.int32) for n in range(32)]
    template = Template(1, np.array([], int), 2, 64)
    draw = pipeline.Draw([32], 32, 5)
    options = dict(hidden_size=32, intermediate_size=64, row_length=64, rows=None)
    chosen = [
        pipeline.choose_shapes(
            [view],
            draw,
            template,
            template,
            devices=2,
            most_tokens=256,
            overhead_tokens=one,
            **options,
        ).rows
        for one in (1, 40)
    ]
    shapes = layout.Shapes(2, 16, 64, 1, 64, 64)
    rows = pipeline.BatchBuilder([view], draw, shapes, template, template, [0, 1])(0).rows
    assert rows == 11
    costs = {
        overhead: {g: -(-rows // g) * (g * 64 + overhead) for g in (1, 2, 4)}
        for overhead in (1, 40)
    }
    assert chosen == [min(cost, key=cost.get) for cost in costs.values()]
