"""The front door says what works: its commands are those that CI runs, its fields exist."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from arcticjax import errors
from arcticjax.config import MineConfig, RunConfig, load, load_config
from arcticjax.config.fields import describe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
)
COMMANDS = (
    "pip install uv && uv run python -m arcticjax.train --config configs/quickstart.yaml",
    "pip install uv && uv run --group test pytest",
)
# What a config is read as, by its folder below configs/.
SCHEMAS = {"configs": RunConfig, "mine": MineConfig}
FIELDS = {
    field
    for schema in SCHEMAS.values()
    for field in re.findall(r"^  ([a-z_]+(?:\.[A-Za-z_0-9]+)*):", describe(schema), re.MULTILINE)
}
FILE_ENDINGS = (".safetensors", ".log", ".lock", ".md", ".html", ".json", ".jsonl")
SECTIONS = {name for schema in SCHEMAS.values() for name in schema.model_fields}


@pytest.mark.parametrize("command", COMMANDS)
def test_ci_runs_the_two_commands_as_typed(command):
    for file in ("README.md", ".ci/run"):
        assert command in (ROOT / file).read_text().splitlines(), file


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.name)
def test_every_config_loads(file):
    load(SCHEMAS[file.parent.name], file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_field_on_a_page_exists(page):
    """Dotted paths in code spans and after --set, and whole YAML blocks."""
    text = page.read_text()
    spans = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?::[^`]*)?`", text)
    spans += re.findall(r"--set ([a-z_]+(?:\.[a-z_0-9]+)+)=", text)
    for span in spans:
        if span.partition(".")[0] in SECTIONS and not span.endswith(FILE_ENDINGS):
            assert re.sub(r"\.\d+(?=\.|$)", ".N", span) in FIELDS, span
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for path in _paths(yaml.safe_load(block)):
            assert path in FIELDS, path


def test_the_yaml_of_the_readme_is_a_config(tmp_path):
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    assert len(load_config(tmp_path / "mine.yaml").data.sources) == 2


def test_every_exit_code_is_documented():
    table = (ROOT / "docs" / "exit_codes.md").read_text()
    for error in errors.ArcticError.__subclasses__():
        assert re.search(rf"^\| {error.exit_code} \|.*`{error.__name__}`", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists(page):
    """Its module, its options and the configs that it names; what stands behind ` -- ` is a command
    of its own."""
    text = page.read_text().replace(" -- ", "\n")
    for module, rest in re.findall(r"python -m ((?:\w+\.)+\w+)([^`\n]*)", text):
        place = ROOT / module.replace(".", "/")
        files = [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else []
        source = "".join(file.read_text() for file in files or place.glob("*.py"))
        assert "__main__" in source or (place / "__main__.py").is_file(), module
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert option == "--help" or f'"{option}"' in source, f"{module} {option}"
        for config in re.findall(r"configs/\w+\.yaml", rest.replace("_X.", "_m.")):
            assert (ROOT / config).is_file(), config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_on_a_page_exists_and_is_marked_as_there(page):
    """(slow) or (extra tpu) stands behind a test of which no case is in the default run."""
    for file, test, said in re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`(?: \((slow|extra tpu)\))?", page.read_text()
    ):
        assert said == _mark(ROOT / file, test), f"{file}::{test}"


def _mark(file, test):
    module = ast.parse(file.read_text())
    [function] = [
        node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == test
    ]
    marks = list(function.decorator_list)
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks += node.value.elts if isinstance(node.value, ast.List) else [node.value]
    words = {ast.unparse(mark).partition("(")[0] for mark in marks}
    if "pytest.mark.slow" in words:
        return "slow"
    return "extra tpu" if "pytest.mark.tpu" in words else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).is_file(), target


def _paths(value, path=""):
    """Dotted paths of the leaves of a config; list places of mappings are N."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for inner in value:
            yield from _paths(inner, f"{path}.N")
    else:
        yield path
