"""Which implementation of attention a device gets."""

import json
from types import SimpleNamespace

import pytest

from arcticjax.errors import ConfigError
from arcticjax.models.attention_choice import IMPLEMENTATIONS, KEY, choose, measured, refusal

SHAPE = {"dtype": "bfloat16", "head_size": 32, "row_length": 256}
PLATFORMS = {
    "xla": ("cpu", "gpu", "tpu"),
    "looped": ("cpu", "gpu", "tpu"),
    "cudnn": ("gpu",),
    "packed": ("gpu",),
    "splash": ("tpu",),
}


def device(platform):
    return SimpleNamespace(platform=platform, device_kind=f"a {platform}")


@pytest.fixture
def table(tmp_path):
    """Writes entries: (platform, device kind, head size, row length, dtype) to milliseconds."""

    def write(entries):
        file = tmp_path / "times.json"
        file.write_text(
            json.dumps(
                [
                    {**dict(zip(KEY, key, strict=True)), "milliseconds": times}
                    for key, times in entries.items()
                ]
            )
        )
        return file

    return write


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_each_on_its_platform(implementation, platform):
    if platform in PLATFORMS[implementation]:
        assert choose(implementation, device=device(platform), **SHAPE) == implementation
    else:
        with pytest.raises(ConfigError, match=rf"train\.attention: {implementation}.*{platform};"):
            choose(implementation, device=device(platform), **SHAPE)


@pytest.mark.parametrize(
    ("implementation", "change", "part"),
    [
        ("cudnn", {"dtype": "float32"}, "bfloat16, train.precision is float32"),
        ("splash", {"dtype": "float32"}, "bfloat16, train.precision is float32"),
        ("cudnn", {"head_size": 36}, "multiple of 8 up to 128, the model's have 36"),
        ("cudnn", {"head_size": 256}, "multiple of 8 up to 128, the model's have 256"),
        ("cudnn", {"row_length": 255}, "even length"),
        ("packed", {"dtype": "float32"}, "bfloat16, train.precision is float32"),
        ("packed", {"head_size": 48}, "heads of 16, 32, 64 or 128, the model's have 48"),
        ("packed", {"row_length": 264}, "these have 264 (data.row_length: 320 would do)"),
        ("splash", {"row_length": 264}, "these have 264 (data.row_length: 384 would do)"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(implementation, change, part):
    platform = PLATFORMS[implementation][0]
    assert part in refusal(implementation, platform=platform, **{**SHAPE, **change})
    with pytest.raises(ConfigError) as caught:
        choose(implementation, device=device(platform), **{**SHAPE, **change})
    assert part in str(caught.value) and str(caught.value).endswith("xla or auto")
    assert choose("auto", device=device(platform), **{**SHAPE, **change}) != implementation


def test_on_gpus_packed_was_measured_fastest_and_cudnn_next():
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    assert choose("auto", device=gpu, **SHAPE) == "packed"
    assert choose("auto", device=gpu, **{**SHAPE, "row_length": 200}) == "cudnn"


def test_auto_takes_the_fastest_of_the_nearest_measurement(table):
    """Of the same kind rather than another of its platform, then by head size, then by length."""
    slow, fast = {"xla": 1.0, "cudnn": 2.0}, {"xla": 2.0, "cudnn": 1.0}
    file = table(
        {
            ("gpu", "a gpu", 32, 256, "bfloat16"): fast,
            ("gpu", "a gpu", 64, 128, "bfloat16"): slow,
            ("gpu", "a gpu", 64, 512, "bfloat16"): fast,
            ("gpu", "another", 64, 256, "bfloat16"): slow,
            ("tpu", "a tpu", 32, 256, "bfloat16"): {"xla": 2.0, "splash": 1.0},
        }
    )

    def auto(platform, **change):
        return choose("auto", device=device(platform), table=file, **{**SHAPE, **change})

    assert auto("gpu") == "cudnn" and auto("tpu") == "splash"
    assert auto("gpu", row_length=4096) == "cudnn" and auto("gpu", head_size=40) == "cudnn"
    assert auto("gpu", head_size=64, row_length=200) == "xla"
    assert auto("gpu", head_size=64, row_length=300) == "cudnn"
    unknown = SimpleNamespace(platform="gpu", device_kind="a newer gpu")
    assert choose("auto", device=unknown, table=file, **{**SHAPE, "head_size": 64}) == "xla"
    assert choose("auto", device=unknown, table=file, **SHAPE) == "cudnn"
    assert auto("cpu") == auto("gpu", dtype="float32") == "xla"


def test_auto_never_takes_what_cannot_run(table):
    """A table from elsewhere, or of a shape that an older version took."""
    times = {"xla": 2.0, "splash": 1.0, "other": 0.5}
    file = table({("tpu", "a tpu", 32, 256, "bfloat16"): times})
    shape = {**SHAPE, "row_length": 200}
    assert choose("auto", device=device("tpu"), table=file, **shape) == "xla"


def test_the_packages_table_can_be_read():
    for (*_, head_size, row_length, dtype), times in measured().items():
        assert head_size % 8 == 0 and row_length % 8 == 0
        assert dtype in ("float32", "bfloat16")
        assert "xla" in times and set(times) <= set(IMPLEMENTATIONS)
        assert all(time > 0 for time in times.values())


def test_splash_is_not_for_models_with_windows(table):
    tpu, shape = device("tpu"), SHAPE | {"row_length": 256}
    with pytest.raises(ConfigError, match=r"train\.attention: splash .*no windows.*set .* to xla"):
        choose("splash", device=tpu, windowed=True, **shape)
    file = table({("tpu", "a tpu", 32, 256, "bfloat16"): {"xla": 2.0, "splash": 1.0}})
    assert choose("auto", device=tpu, table=file, **shape) == "splash"
    assert choose("auto", device=tpu, table=file, windowed=True, **shape) == "xla"
    assert choose("cudnn", device=device("gpu"), windowed=True, **shape) == "cudnn"
