"""The command line: what it prints, draws and refuses, and the report it leaves."""

import re

import pytest
from pyarrow import parquet

from arcticjax.errors import ConfigError, DataError
from arcticjax.mine import __main__ as command
from arcticjax.mine import report
from tests.mine import making

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compiler):
    folder = tmp_path_factory.mktemp("command")
    making.mine(folder, "out")
    return folder


def test_sweep_needs_only_the_output(folder, capsys):
    (folder / "out" / "report" / "a-sweep.png").unlink(missing_ok=True)
    command.main(["--sweep", "--output", str(folder / "out"), "--negatives", "3"])
    said = capsys.readouterr().out
    assert "a: 60 of 60 queries, 3 negatives wanted" in said
    assert re.search(r"^score +1 +60 +100\.0 % +\d", said, re.MULTILINE)
    assert re.search(r"^share of the lowest positive's score +0\.95 ", said, re.MULTILINE)
    picture = (folder / "out" / "report" / "a-sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    by_config = making.config_file(folder)
    command.main(["--config", str(by_config), "--sweep", "--negatives", "3"])
    assert capsys.readouterr().out == said


def test_the_report_stands_by_itself(folder):
    made = folder / "out" / "report"
    text = (made / "report.md").read_text()
    for heading in ("## a", "### Scores", "### Yield", "### False negatives", "### Examples"):
        assert heading in text
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (made / name).read_bytes().startswith(b"\x89PNG")
    page = (made / "report.html").read_text()
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 4
    assert "http" not in page
    assert "40 queries" not in text and "41 queries of task among 41 documents" in text


def test_text_is_text_in_both_forms():
    parts = [report.Quotes(["<b>*a* | b</b>"]), [["x"], ["<i>"]]]
    assert "&lt;b&gt;*a* | b&lt;/b&gt;" in report.to_html(parts)
    assert "<td>&lt;i&gt;</td>" in report.to_html(parts)
    assert r"\<b\>\*a\* \| b\</b\>" in report.to_markdown(parts)


def test_plan(folder, capsys):
    file = str(making.config_file(folder))
    command.main(["--config", file, "--plan", "1e6/1e7", "--topology", "v5e:2x4"])
    assert "1,000,000 queries x 10,000,000 documents x 32" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--plan: '3' is not two counts"):
        command.main(["--config", file, "--plan", "3"])
    with pytest.raises(ConfigError, match="--lengths: '1/2' is not two means"):
        command.main(["--config", file, "--plan", "3/3", "--lengths", "1/2"])


def test_print_config_and_output(folder, capsys):
    command.main(
        ["--config", str(making.config_file(folder)), "--output", "elsewhere", "--print-config"]
    )
    assert "output: elsewhere" in capsys.readouterr().out


def test_suspicious_candidates_are_found_without_a_config(folder, tmp_path):
    """The folder says itself where its inputs are."""
    arguments = ["--suspicious", str(folder / "out"), "--output", str(tmp_path / "s.parquet")]
    with pytest.raises(ConfigError, match=r"choose a group with --group \(a, task\)"):
        command.main(arguments)
    command.main([*arguments, "--group", "task"])
    rows = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert {"positive", "above the positive"} <= {sign for row in rows for sign in row["signs"]}
    assert all(row["query"] and row["document"] for row in rows)


def test_mistakes(folder, tmp_path):
    with pytest.raises(ConfigError, match="--config FILE is missing"):
        command.main([])
    with pytest.raises(ConfigError, match="--negatives: 0 is not 1 or more"):
        command.main(["--sweep", "--output", str(folder / "out"), "--negatives", "0"])
    with pytest.raises(DataError, match="no finished candidates"):
        command.main(["--sweep", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="unrecognized arguments"):
        command.main(["--swep"])
