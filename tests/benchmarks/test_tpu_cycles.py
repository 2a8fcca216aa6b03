"""Adding up the TPU compiler's estimates."""

import pytest

from benchmarks import tpu_cycles

# As the TPU compiler writes it, cut down: a loop over 12 layers within one over microbatches.
PROGRAM = """HloModule jit_step, is_scheduled=true

%layer_condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[] constant(12)
  ROOT %lt.1 = pred[] compare(%i.1, %constant.9), direction=LT
}

%layer_body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/while/body/jvp(attention)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/mlp/norm/reduce_sum"}, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%microbatch_condition.1 (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i.2, %count), direction=LT
}

%microbatch_body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, backend_config={"window_config":{"estimated_cycles":"1"}}
  ROOT %while.1 = (s32[], f32[8]) while(%t), condition=%layer_condition.1, body=%layer_body.1
}

ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %fusion.4 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %while.2 = (s32[], f32[8]) while(%t), condition=%microbatch_condition.1, body=%microbatch_body.1
  ROOT %copy.1 = f32[8]{0} copy(%y)
}
"""  # noqa: E501


@pytest.mark.parametrize("microbatches", [1, 5])
def test_loops_count_as_often_as_they_run(microbatches):
    found = {one.name: one for one in tpu_cycles.costs(PROGRAM, microbatches)}
    assert {name: (one.part, one.cycles) for name, one in found.items()} == {
        "fusion.1": ("attention", 1200 * microbatches),
        "fusion.2": ("norm", 120 * microbatches),
        "fusion.3": ("the rest", microbatches),
        "fusion.4": ("optimizer", 1000),
    }


def test_other_text_is_refused():
    with pytest.raises(SystemExit, match="--hlo"):
        tpu_cycles.costs("no program", 1)
