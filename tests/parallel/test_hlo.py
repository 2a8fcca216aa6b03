import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from arcticjax.parallel import hlo
from arcticjax.parallel import mesh as meshes

SIZES = {"data": 4, "fsdp": 2}


@pytest.fixture(scope="module")
def found():
    """The collectives of one program on 4 x 2 devices, each operation once, by operation."""
    mesh = meshes.make_mesh(4, 2)

    def on_device(x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        part = jax.lax.psum_scatter(whole * 2, ("data", "fsdp"), tiled=True)
        swapped = jax.lax.all_to_all(whole * 3, "data", 0, 0, tiled=True)
        shifted = jax.lax.ppermute(x + 1, "data", [(n, (n + 1) % 4) for n in range(4)])

        def again(_, total):
            return jax.lax.pcast(jax.lax.psum(total, "fsdp") / 2, "fsdp", to="varying")

        looped = jax.lax.fori_loop(0, x.shape[0] + shifted[0, 0].astype(int), again, x)
        return jax.lax.psum(looped.sum() + swapped.sum() + part.sum(), "data")[None]

    program = jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P("fsdp"))
    )
    text = program.lower(jax.ShapeDtypeStruct((128, 3), jnp.float32)).compile().as_text()
    assert text is not None
    return {(one.op, one.in_loop): one for one in hlo.collectives(text)}


@pytest.mark.parametrize(
    ("op", "in_loop", "axes", "size"),
    [
        ("all-gather", False, ("fsdp",), 2 * 16 * 3 * 4),
        ("reduce-scatter", False, ("data", "fsdp"), 2 * 16 * 3 * 4),
        ("all-to-all", False, ("data",), 2 * 16 * 3 * 4),
        ("collective-permute", False, ("data",), 16 * 3 * 4),
        ("all-reduce", True, ("fsdp",), 16 * 3 * 4),
        ("all-reduce", False, ("data",), 4),
    ],
)
def test_operation_axis_bytes_and_loop_of_each_collective(found, op, in_loop, axes, size):
    one = found[op, in_loop]
    assert (one.axes(SIZES), one.bytes) == (axes, size)


def test_a_program_has_these_collectives_and_no_others(found):
    assert len(found) == 6


HEAD = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
STRIDED = ((0, 2, 4, 6), (1, 3, 5, 7))


def one(line):
    (found,) = hlo.collectives(f"{HEAD}ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n")
    return found


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("{}", (tuple(range(8)),)),
        ("[4,2]<=[8]", PAIRS),
        ("[2,4]<=[4,2]T(1,0)", STRIDED),
        ("mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("mesh['a'=4,'b'=2] {'a'}", STRIDED),
        ("mesh['a'=4,'b'=2] {'a','b'}", (tuple(range(8)),)),
    ],
)
def test_groups_in_every_notation(groups, expected):
    line = f"ROOT %r = f32[4] all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert one(line).groups == expected


@pytest.mark.parametrize("groups", ["mesh['a'=8] {'a':(2)4}", "v9(8)"])
def test_an_unknown_notation_is_an_error(groups):
    with pytest.raises(ValueError, match=r"can(not)? be read"):
        one(f"%r = f32[4] all-reduce(%p), replica_groups={groups}, to_apply=%add")


@pytest.mark.parametrize(
    ("line", "op", "size"),
    [
        (
            "%g = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)S(1)}) "
            "all-gather-start(%p), replica_groups={}, dimensions={0}",
            "all-gather",
            512 * 128 * 2,
        ),
        (
            "%r = (f32[384]{0:T(512)}, f32[2,384]{1,0:T(2,128)S(1)}, /*index=2*/pred[], s4[6]) "
            "all-reduce-start(%p, %q), replica_groups={}, to_apply=%add",
            "all-reduce",
            4 * 384 * 3 + 1 + 3,
        ),
        (
            "%s = f32[64,384]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}",
            "reduce-scatter",
            2 * 64 * 384 * 4,
        ),
        (
            "%c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            32,
        ),
    ],
)
def test_payload_of_asynchronous_combined_and_scattered_forms(line, op, size):
    found = one(line)
    assert (found.op, found.bytes) == (op, size)


def test_a_done_and_a_use_are_no_collectives():
    assert not hlo.collectives(
        f"{HEAD}ENTRY %main (p: f32[4]) -> f32[4] {{\n"
        "  %d = f32[4] all-reduce-done(%s)\n  %f = f32[4] fusion(%all-reduce.4), calls=%g\n}\n"
    )


def test_loops_are_followed_through_calls():
    line = "%{0} = f32[4] all-reduce(%p), replica_groups={{}}, to_apply=%add"
    text = f"""{HEAD}%inner (p: f32[4]) -> f32[4] {{
  {line.format("deep")}
}}

%body (p: f32[4]) -> f32[4] {{
  %c = f32[4] conditional(%p, %q), branch_computations={{%inner, %other}}
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %w = f32[4] while(%p), condition=%check, body=%body
  {line.format("flat")}
}}
"""
    assert {one.name: one.in_loop for one in hlo.collectives(text)} == {"deep": True, "flat": False}
