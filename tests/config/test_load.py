"""Every way a config can be wrong is reported: where, what was given, what was expected."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from arcticjax.config import RunConfig, differences, dump_config, load_config
from tests.config.writing import MINIMAL, replaced, report

ROOT = Path(__file__).resolve().parents[2]


def test_minimal_file_and_defaults(write):
    config = load_config(write(MINIMAL))
    assert config.optimizer.learning_rate == 1e-5
    assert config.run.directory == "runs/x"
    assert config.data.sources[0].path == "web.parquet"
    assert config.data.query_length == 32 and config.data.document_length == 256
    assert config.loss.temperature == 0.02 and config.mesh.data == "auto"
    with pytest.raises(Exception, match="frozen"):
        config.run.seed = 3


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2e3", 2000.0), ("1.e-5", 1e-5), (".5", 0.5), ("3", 3.0),
     ("+1e-5", 1e-5), ("1_0.5", 10.5)],
)  # fmt: skip
def test_numbers(write, written, value):
    rate = load_config(write(replaced("1e-5", written))).optimizer.learning_rate
    assert rate == value and isinstance(rate, float)


@pytest.mark.parametrize("written", ["no", "off", "False", "NO"])
def test_yaml_booleans(write, written):
    config = load_config(write(MINIMAL + f"export:\n  enabled: {written}\n"))
    assert config.export.enabled is False


@pytest.mark.parametrize("empty", ["loss:\n", "loss: {}\n", "loss:\n  # temperature: 0.1\n"])
def test_an_empty_section_means_its_defaults(write, empty):
    assert load_config(write(MINIMAL + empty)).loss.temperature == 0.02


def test_bom_and_crlf(write):
    text = b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()
    assert load_config(write(text)) == load_config(write(MINIMAL, "d.yaml"))


# Each case: the text, and what the report must hold.
BAD_TEXT = {
    "empty": ("", ["c.yaml: the file holds no fields"]),
    "comments only": ("# a\n\n", ["c.yaml: the file holds no fields"]),
    "a list": ("- a\n- b\n", ["c.yaml: expected sections", "got a list of 2"]),
    "a word": ("hello\n", ["c.yaml: expected sections", "'hello'"]),
    "missing colon space": ("run:directory\n", ["c.yaml: expected sections"]),
    "tab": (replaced("  directory", "\tdirectory"), ["c.yaml:2: a tab", "spaces"]),
    "unclosed": (MINIMAL + "loss: {tile: [1\n", ["c.yaml:15: not YAML"]),
    "two documents": (MINIMAL + "---\nrun: {}\n", ["c.yaml:14: a second document"]),
    "not utf-8": (MINIMAL.encode() + b"# \xff\n", ["c.yaml: line 14 is not UTF-8"]),
    "binary": (b"\x00\x01\x02", ["c.yaml: not a text file"]),
    "duplicate": (
        replaced("  global_batch: 64", "  global_batch: 64\n  global_batch: 32"),
        ["c.yaml:14: train.global_batch: given twice, first on line 13"],
    ),
    "duplicate section": (
        MINIMAL + "train:\n  global_batch: 2\n",
        ["c.yaml:14: train: given twice, first on line 11"],
    ),
    "alias": (
        MINIMAL + "evaluation:\n  tasks: &t [beir:x]\n  demo_queries: *t\n",
        ["c.yaml:16: evaluation.demo_queries: aliases are not read (*t)"],
    ),
    "merge": (
        "base: &b {a: 1}\n" + MINIMAL + "loss:\n  <<: *b\n",
        ["c.yaml:1: base: unknown field", "c.yaml:16: loss.<<: aliases are not read (*b)"],
    ),
    "python tag": (
        replaced("runs/x", "!!python/object/apply:os.system ['touch owned']"),
        ["c.yaml:2: run.directory: the tag !!python/object/apply:os.system is not read"],
    ),
    "unknown tag": (replaced("runs/x", "!here"), ["run.directory: the tag !here is not read"]),
    "wrong tag": (replaced("64", "!!int many"), ["train.global_batch: cannot read `many` as int"]),
    "key not text": (MINIMAL + "loss:\n  1: 2\n", ["c.yaml:15: loss: `1` is no field name"]),
    "key a list": (MINIMAL + "? [a]\n: b\n", ["a list or mapping is no field name"]),
    "key a boolean": (MINIMAL + "loss: {no: 2}\n", ["loss: `no` is no field name"]),
    "deep": (MINIMAL + "loss: " + "[" * 900_000, ["c.yaml:14: nested deeper than 32"]),
    "huge number": (replaced("64", "9" * 5000), ["train.global_batch: cannot read `999"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(write, case):
    text, expected = BAD_TEXT[case]
    message = report(write(text))
    for part in expected:
        assert part in message
    assert not Path("owned").exists()
    # What is already reported is not reported a second time as a wrong value.
    assert message.count("\n") in (0, len(expected))
    assert "unreadable" not in message


def test_alias_bomb_is_refused_at_once(write):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join('*' + chr(97 + i) for _ in range(9))}]\n"
        for i in range(12)
    )
    assert "aliases are not read" in report(write(bomb))


def test_size_cap(write):
    # 1 MB exactly is still read; a byte more is not.
    padding = "#" * (1_000_000 - len(MINIMAL) - 1) + "\n"
    load_config(write(MINIMAL + padding))
    message = report(write(MINIMAL + "#" + padding))
    assert "c.yaml: is larger than 1 MB" in message


def test_missing_file(write):
    write(MINIMAL, "quickstart.yaml")
    assert report("quikstart.yaml") == (
        "quikstart.yaml: no such file; did you mean quickstart.yaml?"
    )
    assert report("nowhere/c.yaml") == "nowhere/c.yaml: no such file, and no folder nowhere"


def test_directory_in_place_of_file(write, tmp_path):
    write(MINIMAL, "some.yaml")
    message = report(str(tmp_path))
    assert message == f"{tmp_path}: is a folder, expected a YAML file; it holds some.yaml"


def test_unusable_path(write):
    assert "cannot be read" in report("a\0b")
    write(MINIMAL)
    assert "cannot be read" in report("c.yaml/inside")


def test_path_objects(write):
    assert load_config(Path(write(MINIMAL))).run.directory == "runs/x"


# Each case: what replaces what in MINIMAL, and the whole report.
BAD_VALUE = {
    "typo": (
        "learning_rate: 1e-5",
        "learning_rat: 1e-5",
        "c.yaml:10: optimizer.learning_rat: unknown field; did you mean optimizer.learning_rate? "
        "(got 1e-05)",
    ),
    "section typo": (
        "optimizer:",
        "optimiser:",
        "c.yaml:9: optimiser: unknown field; did you mean optimizer? "
        "(got a section with learning_rate)",
    ),
    "wrong section": (
        "  directory: runs/x",
        "  directory: runs/x\n  temperature: 0.1",
        "c.yaml:3: run.temperature: unknown field; did you mean loss.temperature? (got 0.1)",
    ),
    "nothing near": (
        "  directory: runs/x",
        "  directory: runs/x\n  zzz: 1",
        "c.yaml:3: run.zzz: unknown field; run has directory, seed, compilation_cache (got 1)",
    ),
    "quoted number": (
        "64",
        "'64'",
        "c.yaml:13: train.global_batch: expected a whole number >= 2, got '64'; remove the quotes",
    ),
    "number as text": (
        "1e-5",
        "fast",
        "c.yaml:10: optimizer.learning_rate: expected a number > 0, got 'fast'",
    ),
    "fraction of a pair": (
        "64",
        "64.0",
        "c.yaml:13: train.global_batch: expected a whole number >= 2, got 64.0",
    ),
    "octal": (
        "64",
        "0o100",
        "c.yaml:13: train.global_batch: expected a whole number >= 2, got '0o100'",
    ),
    "true for a number": (
        "64",
        "true",
        "c.yaml:13: train.global_batch: expected a whole number >= 2, got true",
    ),
    "not a number": (
        "1e-5",
        ".nan",
        "c.yaml:10: optimizer.learning_rate: expected a number > 0, got nan",
    ),
    "infinite": (
        "1e-5",
        ".inf",
        "c.yaml:10: optimizer.learning_rate: expected a number > 0, got inf",
    ),
    "no for text": (
        "runs/x",
        "no",
        "c.yaml:2: run.directory: expected non-empty text, got no, which YAML reads as false; "
        "put it in quotes",
    ),
    "number for text": (
        "runs/x",
        "2024",
        "c.yaml:2: run.directory: expected non-empty text, got 2024; put it in quotes",
    ),
    "empty text": (
        "runs/x",
        "''",
        "c.yaml:2: run.directory: expected non-empty text, got ''",
    ),
    "null": (
        "  directory: runs/x",
        "  directory:",
        "c.yaml:2: run.directory: expected non-empty text, got null",
    ),
    "missing": (
        "  global_batch: 64\n",
        "",
        "c.yaml:11: train.global_batch: required, and not given; expected a whole number >= 2. "
        "Pairs in one step, over all devices.",
    ),
    "missing section": (
        "run:\n  directory: runs/x\n",
        "",
        "c.yaml: run.directory: required, and not given; expected non-empty text. Folder of the "
        "run: config, metrics, checkpoints, report and export. The same command on the same "
        "folder resumes. Relative to the working directory; or a place in a bucket, "
        "s3://BUCKET/NAME or gs://BUCKET/NAME.",
    ),
    "section is a value": (
        "  directory: runs/x",
        "  5",
        "c.yaml:1: run: expected a section of fields, got 5",
    ),
    "choice": (
        "64",
        "64\n  precision: bf16",
        "c.yaml:14: train.precision: expected float32 | bfloat16, got 'bf16'; did you mean "
        "bfloat16?",
    ),
    "union": (
        "64",
        "64\nmesh: {data: 0}",
        "c.yaml:14: mesh.data: expected a whole number >= 1 or auto, got 0",
    ),
    "union word": (
        "64",
        "64\nmesh: {data: atuo}",
        "c.yaml:14: mesh.data: expected a whole number >= 1 or auto, got 'atuo'; did you mean "
        "auto?",
    ),
    "union list": (
        "  sources:",
        "  docstrings: {packages: [jax, 5]}\n  sources:",
        "c.yaml:6: data.docstrings.packages.1: expected non-empty text, got 5; put it in quotes",
    ),
    "word for a list": (
        "64",
        "64\nevaluation: {tasks: docstrings}",
        "c.yaml:14: evaluation.tasks: expected a list of non-empty text, got 'docstrings'; write "
        "[docstrings]",
    ),
    "list item": (
        "      path: web.parquet",
        "      pth: web.parquet",
        "c.yaml:8: data.sources.0.pth: unknown field; did you mean data.sources.0.path? "
        "(got 'web.parquet')",
    ),
    "name climbs out": (
        "web\n",
        "..\n",
        "c.yaml:7: data.sources.0.name: expected text of letters, digits, . _ - that does not "
        "start with a dot, got '..'",
    ),
    "long value": (
        "1e-5",
        "x" * 500,
        "c.yaml:10: optimizer.learning_rate: expected a number > 0, got '" + "x" * 76 + "...",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUE)
def test_bad_value(write, case):
    old, new, expected = BAD_VALUE[case]
    assert report(write(replaced(old, new))) == expected


def test_every_problem_in_one_report(write):
    text = """\
run:
  seed: -1
  directory: runs/x
model:
  init: a
  preset: m
data:
  sorces: []
  query_length: 2
  docstrings: {}
optimizer:
  learning_rate: fast
  schedule: wsd
  schedule: wsd
train:
  total_steps: 10
evaluation:
  tasks: [docstrings]
"""
    message = report(write(text), "loss.temp=1", "mesh.fsdp=0", "oops")
    starts = [
        "c.yaml:2: run.seed: ",
        "c.yaml:6: model.preset: ",
        "c.yaml:8: data.sorces: ",
        "c.yaml:9: data.query_length: ",
        "c.yaml:11: optimizer.decay_steps: ",
        "c.yaml:12: optimizer.learning_rate: ",
        "c.yaml:14: optimizer.schedule: given twice",
        "c.yaml:15: train.global_batch: ",
        "c.yaml:18: evaluation.tasks.0: ",
        "--set loss.temp=1: loss.temp: unknown field; did you mean loss.temperature?",
        "--set mesh.fsdp=0: mesh.fsdp: ",
        "--set oops: expected PATH=VALUE",
    ]
    heading, *lines = message.splitlines()
    assert heading == f"{len(starts)} problems in the config:"
    # In the order of the file, then of the overrides.
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith("  " + start)


def test_dump_is_plain_yaml_with_every_field(write):
    config = load_config(write(MINIMAL))
    text = dump_config(config)
    assert load_config(write(text, "d.yaml")) == config
    assert yaml.safe_load(text) == config.model_dump()


_words = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(["no", "1e-5", "010", "1:30", "null", "~", "2024-01-01", "<<", "=", "*a", "- a",
                     ".inf", "\x85", "\u2028", "a: b", "# c", " x ", "\ttab", "!x", "1_0", "+1e5"]),
)  # fmt: skip


@given(_words, st.lists(_words, max_size=3), st.floats(1e-300, 1e300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_dump_round_trip(tmp_path_factory, word, words, number, flag):
    config = RunConfig.model_validate(
        {
            "run": {"directory": word},
            "model": {"init": word, "query_prompt": word},
            "data": {"docstrings": {"held_out": words}},
            "optimizer": {"learning_rate": number},
            "train": {"global_batch": 2},
            "evaluation": {"tasks": ["beir:x"], "demo_queries": words},
            "export": {"enabled": flag},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "c.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_differences(write):
    a = load_config(write(MINIMAL))
    assert differences(a, a) == []
    b = load_config(
        write(MINIMAL),
        [
            "run.seed=3",
            "data.sources.0.path=y",
            "evaluation.tasks=[beir:x]",
            "data.docstrings={}",
        ],
    )
    assert differences(a, b) == [
        ("run.seed", 0, 3),
        ("data.sources.0.path", "web.parquet", "y"),
        ("data.docstrings", None, b.data.docstrings.model_dump()),
        ("evaluation.tasks", [], ["beir:x"]),
    ]


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("field", ["model.query_prompt", "run.directory"])
def test_a_secret_is_refused_and_not_repeated(write, field, override):
    """It would be copied into config.yaml; other problems may quote it, so it comes first."""
    token = "hf_" + "aB3" * 10
    if override:
        said = report(write(MINIMAL), f"{field}=x/{token}", f"train.total_steps={token}")
    else:
        content = yaml.safe_load(MINIMAL)
        section, name = field.split(".")
        content[section][name] = token
        said = report(write(yaml.safe_dump(content)), f"train.total_steps={token}")
    assert f"{field}: hf_aB3... looks like a secret" in said.replace("--set ", "")
    assert token not in said and "HF_TOKEN" in said


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_config_loads(path):
    config = load_config(path)
    assert math.isfinite(config.optimizer.learning_rate)
    assert not Path(config.run.directory).is_absolute()


def test_quickstart_is_the_embedded_default():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.run.directory == "runs/quickstart"
    assert config.model.init == "sentence-transformers/all-MiniLM-L6-v2"
    assert config.model.pooling is None
    assert config.evaluation.tasks == ["docstrings"]
    assert config.data.docstrings is not None and config.data.docstrings.held_out


def test_config_imports_neither_jax_nor_a_model_library():
    code = (
        "import sys, arcticjax.config; "
        "print([m for m in ('jax', 'flax', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
