import jax
import jax.numpy as jnp
import pytest

from arcticjax.parallel import mesh as meshes
from arcticjax.plan import compile as compiling

EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(24.75G) exceeds available HBM (15.75G)."
)
LATE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 16.50G of 15.75G hbm. Exceeded hbm capacity by 768.00M."
)


@pytest.mark.parametrize(
    ("message", "figure"),
    [
        (EARLY, int(24.75 * 2**30)),
        (LATE, int(16.5 * 2**30)),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_figure_is_read(message, figure):
    assert compiling.out_of_memory(message) == figure


class Refusing:
    """Stands for a lowered program that the compiler refuses with a message."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.fixture(scope="module")
def arguments():
    """1 MiB on each of eight devices, and 1 MiB that all of them hold."""
    mesh = meshes.make_mesh(8)
    cut = jax.ShapeDtypeStruct((8, 2**18), jnp.float32, sharding=meshes.batch_sharding(mesh))
    whole = jax.ShapeDtypeStruct((2**18,), jnp.float32, sharding=meshes.replicated(mesh))
    return {"cut": cut, "whole": whole}


def test_a_refusal_is_an_answer(arguments, capsys):
    early = compiling.compile_program("it", Refusing(EARLY + "\nmore"), arguments)
    assert (early.refused, early.memory_bytes) == (EARLY, int(24.75 * 2**30))
    late = compiling.compile_program("it", Refusing(LATE), arguments)
    assert late.memory_bytes == int(16.5 * 2**30)
    for one in (early, late):
        assert one.temporary_bytes == one.memory_bytes - 2**21  # the arguments
    assert capsys.readouterr().err.count("compiling it") == 2


def test_another_error_is_not(arguments):
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiling.compile_program("it", Refusing("INTERNAL: something else"), arguments)


def test_memory_and_collectives_of_a_program(arguments):
    program = jax.jit(lambda cut, whole: (cut * whole).sum(), donate_argnums=())
    done = compiling.compile_program("it", program.lower(**arguments), arguments)
    assert compiling.device_bytes(arguments) == done.argument_bytes == 2**21
    assert done.memory_bytes == 2**21 + done.temporary_bytes + done.code_bytes
    assert [(one.op, one.bytes) for one in done.collectives] == [("all-reduce", 4)]
    assert done.refused is None


def test_it_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "SECONDS_BETWEEN_LINES", 0.001)
    with compiling._telling("it"):
        while capsys.readouterr().err.count("compiling it: 0 s") == 0:
            pass
