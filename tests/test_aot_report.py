"""What `benchmarks.aot` reads from compiled modules: against modules whose counts are known by hand or by formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.aot import __main__ as command
from benchmarks.aot import hlo, operations, programs, report, targets
from benchmarks.aot.targets import CHIPS, TARGETS, Target
from samplers.plan import Plan, Settings
from wanjax import sharding
from wanjax.config import preset

TPU = (
    """HloModule jit__denoise, is_scheduled=true

%condition (state: (s32[], bf16[8,4], s32[])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%product (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  ROOT %conv = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(f)/blocks/ffn_in/dot"}
}

%body (state: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %n = s32[]{:T(128)} get-tuple-element(%state), index=2
  %w = bf16[4,4]{1,0} constant({...})
  %gather-start = (bf16[8,4]{1,0}, bf16[8,32]{1,0}) all-gather-start(%x), dimensions={1}
  %y = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%product, """
    + """metadata={op_name="jit(f)/blocks/ffn_in/dot"}, backend_config={"window_config":{"estimated_cycles":"70"}}
  %gather-done = bf16[8,32]{1,0} all-gather-done(%gather-start)
  %splash_mha_fwd.3 = bf16[5,8,16]{2,1,0} custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", """
    + """frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/blocks/self_attn/attention_kernel/splash_mha_fwd"}
  %m = s8[1,2,24]{2,1,0} parameter(4)
  %q = bf16[5,8,16]{2,1,0} parameter(1)
  %k = bf16[5,24,16]{2,1,0} parameter(2)
  %v = bf16[5,24,16]{2,1,0} parameter(3)
  ROOT %next = (s32[], bf16[8,4], s32[]) tuple(%i, %y, %n)
}

%nothing (x: bf16[8,4]) -> bf16[8,4] {
  ROOT %x = bf16[8,4]{1,0} parameter(0)
}

%layers (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %four = s32[]{:T(128)} constant(4)
  %copied = s32[]{:T(128)} copy(%four)
  %init = (s32[]{:T(128)}, bf16[8,4]{1,0}, s32[]{:T(128)}) tuple(%zero, %x, %copied)
  %loop = (s32[], bf16[8,4], s32[]) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}

%passes (x: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {
  %x = (s32[], bf16[8,4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %now = bf16[8,4]{1,0} get-tuple-element(%x), index=1
  %n = s32[] get-tuple-element(%x), index=2
  %live = pred[] constant(true)
  %y = bf16[8,4] conditional(%live, %now, %now), true_computation=%layers, false_computation=%nothing
  ROOT %next = (s32[], bf16[8,4], s32[]) tuple(%i, %y, %n)
}

ENTRY %main (n: s32[], x: bf16[8,4]) -> bf16[8,4] {
  %n = s32[] parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[8,4], s32[]) tuple(%zero, %x, %n)
  %loop = (s32[], bf16[8,4], s32[]) while(%init), condition=%condition, body=%passes
  %reduced = bf16[8,4]{1,0} all-reduce(%x), to_apply=%add
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""
)

CUDNN = (
    '%a = (bf16[1,5,48,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", '
    'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", '
    '"dimensions": ["1", "5", "48", "257"], "layout": {"minor_to_major": ["3", "2"]}}, "bmm1_dot_dimension_numbers": '
    '{"lhs_contracting_dimensions": ["3"]}}}'
)
CUBLAS = (
    '%a = (bf16[48,20]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config='
    '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]}}}'
)
CONVOLUTION = (
    "%a = f32[1,5,4,7]{3,2,1,0} convolution(%i, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
)
BATCHED = "%a = bf16[5,8,6]{2,1,0} convolution(%p, %r), window={size=5 pad=4_4 lhs_dilate=4 rhs_reversal=1}, "
BATCHED = BATCHED.replace("pad=4_4 lhs_dilate=4", "stride=4 pad=0_0 lhs_dilate=5") + "dim_labels=0bf_0io->0bf"


def instruction(line: str) -> hlo.Instruction:
    module = hlo.parse(f"ENTRY %main (x: f32[]) -> f32[] {{\n  {line}\n}}\n")
    return module.computations["main"][0]


@pytest.mark.parametrize(
    ("line", "shapes", "wanted"),
    [
        (CUDNN, {}, 4 * 5 * 48 * 257 * 128),
        (CUBLAS, {"x": "bf16[48,30]", "w": "bf16[30,20]"}, 2 * 48 * 30 * 20),
        # Of a 5x4 image a 3x3 kernel meets 13 rows times 10 columns, the rest is padding.
        (CONVOLUTION, {"i": "f32[1,5,4,6]", "w": "f32[3,3,6,7]"}, 2 * 13 * 10 * 6 * 7),
        # How a TPU writes a product of five matrices: every output meets one of the five.
        (BATCHED, {"p": "bf16[5,8,3]", "r": "bf16[5,3,6]"}, 2 * 5 * 8 * 3 * 6),
        ("%a = f32[8]{0} custom-call(%x), custom_call_target=\"AllocateBuffer\"", {"x": "f32[8]"}, 0),
        ("%a = f32[8]{0} custom-call(%x), custom_call_target=\"tpu_custom_call\"", {"x": "f32[8]"}, None),
        ("%a = f32[8]{0} add(%x, %x)", {"x": "f32[8]"}, 0),
    ],
)  # fmt: skip
def test_operations_of_one_instruction(line, shapes, wanted):
    assert operations.operations(instruction(line), shapes) == wanted


def test_sizes_of_printed_shapes():
    assert (
        hlo.size("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[5]{0}, token[], pred[4], f32[])") == 12 + 20 + 4 + 4
    )
    assert hlo.plain("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/f32[5]{0})") == "(bf16[2,3], f32[5])"


def test_loops_branches_collectives_and_kernels_of_a_tpu_module():
    """Two passes that only the run decides, of four layers that follow from a constant two computations away."""
    found = report.describe(TPU, CHIPS["v6e"], traced=2, devices=2, total=8 * (2 * 8 * 4 * 4 + 4 * 5 * 8 * 24 * 16))
    assert [(row["trips"], row["decided_by_run"], row["times"]) for row in found["loops"]] == [
        (2, True, 1),
        (4, False, 2),
    ]
    assert found["operations"]["parts"] == {"self_attn kernel": 8 * 4 * 5 * 8 * 24 * 16, "ffn": 8 * 2 * 8 * 4 * 4}
    assert found["operations"]["times_an_even_share"] == 2  # both devices do all of it
    gather, reduce = found["collectives_in_full"]
    assert (gather["kind"], gather["times"], gather["bytes"], gather["asynchronous"]) == ("all-gather", 8, 512, True)
    assert (reduce["kind"], reduce["times"], reduce["bytes"], reduce["asynchronous"]) == ("all-reduce", 1, 64, False)
    assert found["collectives"]["all-gather"] == {"times": 8, "bytes": 8 * 512, "asynchronous": 8}
    (kernel,) = found["kernels"]
    assert (kernel["name"], kernel["times"]) == ("tpu_custom_call splash_mha_fwd", 8)
    assert (kernel["part"], kernel["operations"]) == ("self_attn kernel", 4 * 5 * 8 * 24 * 16)
    cycles = found["cycles"]
    assert cycles["parts"] == {"ffn": 8 * 70} and cycles["rest_seconds"] == 8 * 70 / 1.75e9
    assert report.scaled(cycles, 4, 40)["rest_seconds"] == pytest.approx(10 * cycles["rest_seconds"])
    outside = cycles | {"outside_blocks_seconds": cycles["rest_seconds"]}
    assert report.scaled(outside, 4, 40)["rest_seconds"] == pytest.approx(cycles["rest_seconds"])
    assert report.scaled(outside, 4, 40)["kernel_seconds"] == pytest.approx(10 * cycles["kernel_seconds"])
    assert cycles["kernel_seconds"] == pytest.approx(8 * 4 * 5 * 8 * 24 * 16 / (0.5 * 918e12))


CHAIN = """HloModule jit_f, is_scheduled=true

%begin (p: bf16[1,8]) -> (bf16[1,8], bf16[8,8], s32[2]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %g.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[1,8], bf16[8,8], s32[2]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[1,8], x: bf16[4,8], w: bf16[8,8]) -> (bf16[4,8], bf16[8,8]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %g.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
  %y = bf16[4,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[4,8], bf16[8,8]) tuple(%y, %g.2)
}

%finish (p: bf16[1,8]) -> bf16[8,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %g.3 = bf16[8,8]{1,0} all-gather(%p), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = bf16[8,8]{1,0} custom-call(%p, %g.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (p: bf16[4,8]) -> bf16[4,1] {
  %p = bf16[4,8]{1,0} parameter(0)
  %r = bf16[4,8]{1,0} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %own = bf16[4,1]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,1}
}

ENTRY %main (p: bf16[1,8], x: bf16[4,8], w: bf16[8,8]) -> bf16[4,1] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %async-collective-start = (bf16[1,8], bf16[8,8], s32[2]) fusion(%p), kind=kCustom, calls=%begin
  %fusion.1 = (bf16[4,8], bf16[8,8]) fusion(%p, %x, %w), kind=kCustom, calls=%beside
  %async-collective-done = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%finish
  %y = bf16[4,8]{1,0} get-tuple-element(%fusion.1), index=0
  ROOT %out = bf16[4,1]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_a_tpu_collective_beside_work_counts_once_and_a_fused_reduction_as_what_it_is():
    found = report.describe(CHAIN, CHIPS["v6e"], 1, 1, 2 * 4 * 8 * 8)
    assert found["collectives"] == {"all-gather": {"times": 1, "bytes": 128, "asynchronous": 1},
                                    "reduce-scatter": {"times": 1, "bytes": 64, "asynchronous": 0}}  # fmt: skip
    assert found["operations"]["times_an_even_share"] == 1


CROSS = """HloModule jit__denoise

%plain (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} constant({...})
  ROOT %y = bf16[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%biased (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} constant({...})
  %y = bf16[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %z = bf16[8,4]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: s32[], x: bf16[8,4]) -> bf16[8,4] {
  %p = s32[] parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  ROOT %y = bf16[8,4] conditional(%p, %x, %x), branch_computations={%plain, %biased}, metadata={op_name="SCOPE/cond"}
}
"""


@pytest.mark.parametrize(("scope", "step"), [("jit(f)/blocks/cross_attn", 1), ("jit(f)/live", 2)])
def test_kab_is_counted_apart_and_other_conditionals_by_their_longer_branch(scope, step):
    found = report.describe(CROSS.replace("SCOPE", scope), CHIPS["h100"], 1, 1, None)["operations"]
    assert (found["device"], found["with_kab"]) == (step * 256, 2 * 256)
    assert found["times_an_even_share"] is None


def test_parts_of_the_model_by_path():
    block = "jit(_denoise)/while/body/WanDiT/while/body/closed_call/blocks"
    paths = {f"{block}/self_attn/q/dot_general": "self_attn",
             f"{block}/self_attn/attention_kernel/dot": "self_attn kernel",
             f"{block}/cross_attn/cond/branch_0_fun/attention_kernel/while": "cross_attn kernel",
             f"{block}/ffn_out/add": "ffn", f"{block}/cross_norm/mul": "rest of block",
             "jit(_denoise)/WanDiT/head/dot_general": "outside blocks", "": "unnamed"}  # fmt: skip
    assert {path: report.part(path) for path in paths} == paths


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("nothing\n")


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_a_module_of_this_machine_agrees_with_the_formula(devices):
    """A loop of products over fake devices: the operations of one, and the reduction that each turn ends in."""
    turns, rows, width = 3, 16, 64
    mesh = sharding.make_mesh({"tensor": devices}, jax.devices()[:devices])
    column, row, whole = (NamedSharding(mesh, spec) for spec in (P(None, "tensor"), P("tensor", None), P()))

    @jax.jit
    def run(x, a, b):
        def turn(x, _):
            with jax.named_scope("blocks/ffn_in"):
                y = jnp.tanh(x @ a) @ b
            return lax.with_sharding_constraint(y, whole), None

        return lax.scan(turn, x, length=turns)[0]

    shapes = ((rows, width), whole), ((width, 2 * width), column), ((2 * width, width), row)
    compiled = run.lower(*(jax.ShapeDtypeStruct(s, np.float32, sharding=to) for s, to in shapes)).compile()
    total = turns * 2 * 2 * rows * width * 2 * width
    found = report.describe(compiled.as_text(), CHIPS["h100"], 1, devices, total)
    assert found["operations"]["times_an_even_share"] == 1
    assert found["loops"][0]["trips"] == turns
    assert {kind: one["times"] for kind, one in found["collectives"].items()} == (
        {"all-reduce": turns} if devices > 1 else {}
    )
    assert report.memory(compiled)["arguments"] == 4 * (rows * width + 4 * width * width // devices)


@pytest.fixture(scope="module")
def plan():
    model = preset("tiny")
    return Plan.of(model, Settings.of(model, frames=9, size=(32, 32), steps=4), platform="cpu")


@pytest.mark.parametrize(("part", "most"), [("denoise", 1.02), ("keyframes", 1.06)])
def test_operations_of_a_program_agree_with_the_formula(plan, part, most):
    """On one device. The autoencoder's temporal taps also multiply the zeros before the first frame."""
    devices = jax.devices()[:1]
    compiled = programs.lower(part, plan, devices, None).compile()
    found = report.describe(compiled.as_text(), CHIPS["h100"], 2, 1, programs.operations(part, plan))
    assert 0.98 < found["operations"]["times_an_even_share"] < most


@pytest.mark.parametrize("part", programs.PARTS)
def test_arrays_of_every_program_lie_where_the_pipeline_puts_them(plan, part):
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh({"sequence": 2, "tensor": 2}, devices)
    text = programs.lower(part, plan, devices, mesh).as_text()
    signature = next(line for line in text.splitlines() if "@main" in line)
    for axis in ("tensor", "sequence"):  # of weights; the autoencoder's are whole everywhere
        assert (f'"{axis}"' in signature) is (part not in programs.PICTURES)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_have_figures_and_a_platform(name):
    target = Target(name)
    assert target.platform == ("gpu" if name.startswith("h100") else "tpu")
    assert target.chip.memory > 15 and target.chip.peak > 1e14 and len(target.packages) == 1


def options(*rest: str):
    return command.parser().parse_args(["--target", "v6e:2x4", *rest])


def test_reports_of_different_programs_have_different_names():
    runs = ["", "--mesh data=2,tensor=4", "--mesh tensor=8", "--size 720x1280", "--frames 9", "--layers 2",
            "--part decode", "--attention chunked", "--dtype float32", "--guidance-mode batched", "--method wan",
            "--steps 10", "--preset i2v_14b", "--option a=1", "--option a=2"]  # fmt: skip
    names = [command.name_of(options(*rest.split())) for rest in runs]
    assert len(set(names)) == len(runs)
    assert names[1] == "denoise_v6e-2x4_data2-tensor4_480x864_81f.json"


@pytest.mark.parametrize("mesh", ["tensor", "tensor=0", "tensor=x", ""])
def test_a_mesh_that_is_none_is_one_line(mesh, capsys):
    with pytest.raises(SystemExit) as ended:
        options("--mesh", mesh)
    assert ended.value.code == 2 and "data=2,tensor=4" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "package"), [("v6e:2x4", "libtpu"), ("h100x8", "jax-cuda13-plugin")])
def test_a_missing_compiler_is_one_line(target, package, monkeypatch, capsys):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        command.main(["--target", target, "--mesh", "tensor=8"])
    assert ended.value.code == 2
    assert f"{package} is not installed; pip install" in capsys.readouterr().err.splitlines()[-1]


SLICED = """HloModule m

%fused (p0: f32[21,8,4], p1: f32[8,4], p2: s32[]) -> (f32[21,8,4], f32[8]) {
  %p0 = f32[21,8,4]{2,1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %cut = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %new = f32[1,8,4]{2,1,0} bitcast(%p1)
  %both = f32[1,8,4]{2,1,0} add(%cut, %new)
  %into = f32[21,8,4]{2,1,0} dynamic-update-slice(%p0, %both, %p2, %zero, %zero)
  %sums = f32[8]{0} bitcast(%cut)
  ROOT %out = (f32[21,8,4]{2,1,0}, f32[8]{0}) tuple(%into, %sums)
}

ENTRY %main (a: f32[21,8,4], b: f32[8,4], i: s32[]) -> bf16[8,4] {
  %a = f32[21,8,4]{2,1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %done = (f32[21,8,4]{2,1,0}, f32[8]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/blocks/cross_attn/add"}
  ROOT %half = bf16[8,4]{1,0} convert(%b), metadata={op_name="jit(f)/blocks/ffn/convert"}
}
"""  # noqa: E501


def test_traffic_counts_slices_and_what_is_written_into_an_array():
    """32 numbers are cut out, 32 added, 32 written back and 32 (here) handed on; a copy in half precision apart."""
    program = report.Program(hlo.parse(SLICED))
    assert program.traffic() == {"cross_attn": 4 * (32 + 32 + 1 + 32 + 32), "ffn": 4 * 32 + 2 * 32}
