"""Sums over a compiled program, against numbers worked out by hand."""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest


def _load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_hlo = _load("_hlo")
_bundles = _load("_bundles")

# A sum, which exchanges of devices apply.
_ADD = """
%add.1 (x.1: f32[], x.2: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  %x.2 = f32[]{:T(128)} parameter(1)
  ROOT %x.3 = f32[]{:T(128)} add(%x.1, %x.2)
}
"""

# Two products of a batch of 4, [2, 3] by [3, 5], which XLA for TPUs writes as windows of one entry each; another
# product; a slice of an array of 7; three trips of a loop whose body makes a sum over devices.
_TPU = """HloModule jit_f, is_scheduled=true

%fused_computation.1 (p.0: f32[4,2,3], p.1: f32[4,3,5]) -> f32[4,2,5] {
  %p.0 = f32[4,2,3]{2,1,0:T(8,128)S(1)} parameter(0)
  %p.1 = f32[4,3,5]{2,1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = f32[4,2,5]{2,1,0:T(8,128)} convolution(%p.0, %p.1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, operand_precision={highest,highest}
}

%fused_computation.2 (p.2: f32[7,8,128], p.3: s32[]) -> f32[1,8,128] {
  %p.2 = f32[7,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.3 = s32[]{:T(128)} parameter(1)
  ROOT %part.1 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.2, %p.3), dynamic_slice_sizes={1,8,128}
}

%body.1 (arg.1: (s32[], f32[4,2,3], f32[4,3,5])) -> (s32[], f32[4,2,3], f32[4,3,5]) {
  %arg.1 = (s32[]{:T(128)}, f32[4,2,3]{2,1,0:T(8,128)S(1)}, f32[4,3,5]{2,1,0:T(8,128)}) parameter(0)
  %a.1 = f32[4,2,3]{2,1,0:T(8,128)S(1)} get-tuple-element(%arg.1), index=1
  %b.1 = f32[4,3,5]{2,1,0:T(8,128)} get-tuple-element(%arg.1), index=2
  %y.1 = f32[4,2,5]{2,1,0:T(8,128)} fusion(%a.1, %b.1), kind=kOutput, calls=%fused_computation.1, backend_config={"estimated_cycles":"10"}
  %z.1 = f32[4,2,5]{2,1,0:T(8,128)} all-reduce(%y.1), to_apply=%add.1
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[4,2,3]{2,1,0:T(8,128)S(1)}, f32[4,3,5]{2,1,0:T(8,128)}) tuple(%a.1, %b.1)
}

%condition.1 (arg.2: (s32[], f32[4,2,3], f32[4,3,5])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(3)
  %arg.2 = (s32[]{:T(128)}, f32[4,2,3]{2,1,0:T(8,128)S(1)}, f32[4,3,5]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %bound.1), direction=LT
}

ENTRY %main.1 (w.1: f32[7,8,128], i.2: s32[], v.1: f32[8,128]) -> f32[1,8,128] {
  %w.1 = f32[7,8,128]{2,1,0:T(8,128)} parameter(0)
  %i.2 = s32[]{:T(128)S(6)} parameter(1)
  %v.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(2)
  %while.1 = (s32[]{:T(128)}, f32[4,2,3]{2,1,0:T(8,128)S(1)}, f32[4,3,5]{2,1,0:T(8,128)}) while(%t.1), condition=%condition.1, body=%body.1
  %low.1 = f32[8,8]{1,0:T(8,128)S(1)} convolution(%v.1, %v.1), dim_labels=bf_oi->bf, metadata={op_name="jit(f)/dot_general"}
  ROOT %row.1 = f32[1,8,128]{2,1,0:T(8,128)} fusion(%w.1, %i.2), kind=kLoop, calls=%fused_computation.2
}
""" + _ADD  # fmt: skip  # noqa: E501


def test_a_tpu_s_program():
    found = _hlo.counts(_TPU)
    assert found.flops == 3 * 2 * 4 * 2 * 3 * 5 + 2 * 8 * 8 * 128
    # Two axes of a tile are padded to 8 x 128. In the loop: b and y, then y and z; after it a row is read and written.
    assert found.bytes == 4 * 8 * 128 * (3 * (4 + 4 + 4 + 4) + 1 + 1)
    assert found.cycles == 30
    assert found.collectives == {"all-reduce": 3}


# A row of an array of 7 is written in place: the new one, or where a condition does not hold the old one.
_IN_PLACE = """HloModule jit_h, is_scheduled=true

%fused_computation.1 (p.0: f32[7,8,128], p.1: s32[], p.2: f32[1,8,128], p.3: pred[]) -> f32[7,8,128] {
  %p.0 = f32[7,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %p.2 = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  %p.3 = pred[]{:T(512)} parameter(3)
  %holds.1 = pred[1,8,128]{2,1,0:T(8,128)(4,1)} broadcast(%p.3), dimensions={}
  %old.1 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,8,128}
  %row.1 = f32[1,8,128]{2,1,0:T(8,128)} select(%holds.1, %p.2, %old.1)
  ROOT %written.1 = f32[7,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.0, %row.1, %p.1)
}

ENTRY %main.1 (w.1: f32[7,8,128], i.1: s32[], v.1: f32[1,8,128], c.1: pred[]) -> f32[7,8,128] {
  %w.1 = f32[7,8,128]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  %v.1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  %c.1 = pred[]{:T(512)S(6)} parameter(3)
  ROOT %new.1 = f32[7,8,128]{2,1,0:T(8,128)} fusion(%w.1, %i.1, %v.1, %c.1), kind=kLoop, calls=%fused_computation.1
}
"""


def test_an_update_in_place_moves_rows_alone():
    assert (
        _hlo.counts(_IN_PLACE).bytes == 3 * 4 * 8 * 128
    )  # the old row and the new one are read, one is written


# An argument of 80 KiB whose rows of 40 are padded to 128, zeros of the array that a loop carries, and an exchange of
# devices 0 and 2, 1 and 3, whose two parts run beside other work, next to one of 0 and 1, 2 and 3.
_EXCHANGES = """HloModule jit_g, is_scheduled=true

%part.1 (p.0: f32[8,128]) -> f32[16,128] {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %gather.1 = f32[16,128]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

%part.2 (p.1: f32[8,128]) -> f32[16,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %gather.2 = f32[16,128]{1,0:T(8,128)} all-gather(%p.1), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

%body.1 (arg.1: (s32[], f32[64,8,40])) -> (s32[], f32[64,8,40]) {
  ROOT %arg.1 = (s32[]{:T(128)}, f32[64,8,40]{2,1,0:T(8,128)}) parameter(0)
}

%condition.1 (arg.2: (s32[], f32[64,8,40])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(3)
  %arg.2 = (s32[]{:T(128)}, f32[64,8,40]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %bound.1), direction=LT
}

ENTRY %main.1 (w.1: f32[64,8,40], v.1: f32[8,128]) -> f32[16,128] {
  %w.1 = f32[64,8,40]{2,1,0:T(8,128)} parameter(0)
  %v.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %zero.1 = f32[]{:T(128)} constant(0)
  %zeros.1 = f32[64,8,40]{2,1,0:T(8,128)S(1)} broadcast(%zero.1), dimensions={}
  %while.1 = (s32[]{:T(128)}, f32[64,8,40]{2,1,0:T(8,128)}) while(%t.1), condition=%condition.1, body=%body.1
  %sum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%v.1), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add.1
  %one.1 = f32[16,128]{1,0:T(8,128)} fusion(%v.1), kind=kCustom, calls=%part.1
  ROOT %two.1 = f32[16,128]{1,0:T(8,128)} fusion(%v.1), kind=kCustom, calls=%part.2
}
""" + _ADD  # fmt: skip  # noqa: E501


def test_padding_fills_and_exchanges():
    found = _hlo.counts(_EXCHANGES)
    assert found.padding == found.carried == {"f32[64,8,40]": 128 / 40}
    assert (
        found.filled == {"zeros.1": 4 * 64 * 8 * 128}
        and found.largest == 4 * 64 * 8 * 128
    )
    assert found.collectives == {"all-gather": 1, "all-reduce": 1}
    assert found.groups == {(0, 2), (1, 3), (0, 1), (2, 3)}


_KERNEL = """HloModule jit_k, is_scheduled=true

ENTRY %main.1 (w.1: f32[8,128]) -> f32[8,128] {
  %w.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %here.1 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %read.1 = f32[8,128]{1,0:T(8,128)} custom-call(%w.1, %here.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"==","cost_estimate":{"flops":"60","transcendentals":"0"}}}
}
"""  # noqa: E501

# Two steps of a loop whose first stage is a step ahead, in each three steps of another one; empty bundles.
_CODE = """
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 }
   0x1   :  {}
   0x2 LB: > { %s2 = sadd.s32 1, %s1 /* iteration index, stage = 1 */ }
   0x3   :  {} /* Start region 1 */
   0x4 LB: >> { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x5   :  {}
   0x6   : >> { %p1 = scmp.ge.s32.totalorder %s3, 3 /* loop exit test */ }
   0x7 PF: > { %p2 = scmp.ge.s32.totalorder %s2, 3 /* loop exit test */  ;;  %s4 = smov %s2 }
   0x8   :  { %s5 = smov 0 }
"""


def test_a_kernel_moves_its_operands_and_says_its_flops():
    found = _hlo.counts(_KERNEL, {"read.1": 7, "another.1": 5})
    assert (found.bytes, found.flops, found.bundles) == (2 * 4 * 8 * 128, 60, 7)


def test_bundles_of_loops_count_as_often_as_they_run(tmp_path):
    (tmp_path / "17-read.1-72-final_bundles.txt").write_text(_CODE)
    (tmp_path / "17-read.1-70-schedule-analysis_final_bundles.txt").write_text(
        "Schedule analysis:"
    )
    assert _bundles.bundles(tmp_path) == {"read.1": 3 + 2 * (3 + 3 * 3)}
    # A loop that begins with an empty bundle is as deep as the next one.
    (tmp_path / "17-read.1-72-final_bundles.txt").write_text(
        _CODE.replace("0x2 LB: > {", "0x2 LB:  {}\n   0x9   : > {")
    )
    assert _bundles.bundles(tmp_path) == {"read.1": 4 + 2 * (3 + 3 * 3)}


def test_a_loop_without_a_bound_is_refused():
    with pytest.raises(ValueError, match=r"the loop while\.1 has no bound"):
        _hlo.counts(
            _TPU.replace(
                "%bound.1 = s32[]{:T(128)} constant(3)",
                "%bound.1 = s32[]{:T(128)} copy(%i.1)",
            )
        )


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_program_of_this_machine(precision):
    """Five trips of a loop, forward and backward: three products of 8 x 16 by 16 x 16 a trip."""

    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(jnp.dot(x, w, precision=precision)), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 16, 16), (8, 16))
    ]
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes)
    found = _hlo.counts(lowered.compile().as_text())
    assert found.flops == 5 * 3 * 2 * 8 * 16 * 16
    assert bool(_hlo.below_highest(lowered.as_text())) == (precision is None)
    assert not found.collectives
