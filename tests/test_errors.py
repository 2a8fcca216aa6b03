"""The command line turns what a user can cause into an exit code and one message."""

import errno

import jax
import pytest

from arcticjax import errors


def code_of(error, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as left:
        errors.run_cli(fail)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (MemoryError(), "the machine's"),
        (MemoryError("cannot allocate 3 GiB"), "cannot allocate 3 GiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory on 0\nmuch\nmore"),
            "RESOURCE_EXHAUSTED: Out of memory on 0",
        ),
    ],
)
def test_memory_that_is_used_up_is_8_and_says_what_to_lower(error, shown, capsys):
    code, said = code_of(error, capsys)
    assert code == 8
    assert said.startswith(f"error: memory is full ({shown}). ") and said.count("\n") == 1
    for field in ("train.microbatch", "train.passes: two", "train.global_batch"):
        assert field in said


def test_a_file_that_may_not_be_touched_is_8_and_named(capsys):
    for number in (errno.EACCES, errno.EROFS, errno.ENOSPC):
        code, said = code_of(OSError(number, "not allowed", "some/file"), capsys)
        assert code == 8 and said.startswith("error: some/file: not allowed. Check its permissions")
        assert said.count("\n") == 1


def test_a_full_disk_without_a_name_keeps_its_traceback_too(capsys):
    code, said = code_of(OSError(errno.ENOSPC, "no room"), capsys)
    assert code == 8 and "Traceback" in said
    assert said.splitlines()[-1].startswith("error: an open file: no room. Check")


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("a bug"),
        jax.errors.JaxRuntimeError("INTERNAL: a bug"),
        ValueError(),
        FileNotFoundError(errno.ENOENT, "no such file", "some/file"),
        PermissionError(errno.EPERM, "no file at all"),
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    def fail():
        raise bug

    with pytest.raises(type(bug)):
        errors.run_cli(fail)


def test_an_interrupt_promises_only_what_the_run_said(capsys):
    assert code_of(KeyboardInterrupt(), capsys) == (130, "error: interrupted\n")
    assert code_of(KeyboardInterrupt("nothing saved"), capsys) == (
        130,
        "error: interrupted: nothing saved\n",
    )


def test_an_error_of_ours_is_its_code_and_message(capsys):
    assert code_of(errors.DataError("a.parquet: empty"), capsys) == (3, "error: a.parquet: empty\n")


def test_the_codes_that_scripts_rely_on():
    assert {one.__name__: one.exit_code for one in errors.ArcticError.__subclasses__()} == {
        "ConfigError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "NumericsError": 5,
        "ResourceError": 8,
        "Preempted": 42,
        "PeerLost": 141,
        "Hung": 142,
    }
