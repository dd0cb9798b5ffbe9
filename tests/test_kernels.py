"""Every kernel, as a user's call launches it, compiles for every target; without a GPU."""

import ast
import json
from typing import Any

import pytest
import torch

from tests.test_backend import python
from tests.test_package import ROOT

pytest.importorskip("triton")

from fused.kernels import tuning

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

# In a process of its own: here Triton's functions are the interpreter's.
REPORT = f"""
import json, sys; sys.path.insert(0, {str(ROOT)!r})
from bench import kernels
from bench.runner import operations
print(json.dumps(kernels.report(operations(OPERATIONS), list(kernels.TARGETS), ONLY)))
"""

# Every option, on meta tensors: the dtype, then what is launched.
OPTIONS = f"""
import json, sys; sys.path.insert(0, {str(ROOT)!r})
import torch
import fused
from bench import kernels

def cross_entropy(dtype):
    weight = torch.ones(320, dtype=dtype)
    numbers = dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5)
    rows = torch.zeros(64, 320, dtype=dtype, requires_grad=True)
    inner = torch.zeros(4, 320, 16, dtype=dtype, requires_grad=True)
    indices = torch.zeros(4, 16, dtype=torch.int64)
    t = torch.zeros(64, 320, dtype=dtype, requires_grad=True)
    for x, target in ((rows, t), (inner, indices)):
        fused.cross_entropy_with_stats(x, target, weight, **numbers).loss.backward()
        fused.cross_entropy(x, target, weight, reduction="none").sum().backward()
    for n_classes in (27, 1000, 32000):
        x = torch.zeros(8192, n_classes, dtype=dtype, requires_grad=True)
        target = torch.zeros(8192, dtype=torch.int64)
        fused.cross_entropy(x, target, label_smoothing=0.1).backward()

def vocab_parallel_cross_entropy(dtype):
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    if not dist.is_initialized():  # the process before the last one of eight, and the only one
        dist.init_process_group("fake", store=FakeStore(), rank=6, world_size=8)
    numbers = dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5)
    for shape, options in (
        ((64, 320), numbers),
        ((8192, 16000), {{}}),
        ((8192, 12565), dict(reduction="none", z_loss=1e-4)),
    ):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        fused.vocab_parallel_cross_entropy(x, target, **options).sum().backward()

def batch_norm(dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((48, 200), (16, 24, 8, 8), (32, 1056, 7, 7), (8192, 64)):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        v = torch.ones(shape[1], dtype=acc, requires_grad=True)
        mean, var = torch.zeros(shape[1], dtype=acc), torch.ones(shape[1], dtype=acc)
        formats = [x]
        if len(shape) == 4:
            formats.append(x.detach().contiguous(memory_format=torch.channels_last))
        for x in formats:
            for activation in (None, "tanh", "relu", "gelu", "silu"):
                for training in (True, False):
                    x = x.detach().requires_grad_()
                    y = fused.batch_norm(x, mean, var, v, v, training, activation=activation,
                                         residual=x.detach().requires_grad_(), correction=1)
                    y.backward(torch.ones_like(y))
            norm = fused.BatchNorm1d if x.dim() == 2 else fused.BatchNorm2d
            norm(shape[1], momentum=None, skip_nonfinite=True, dtype=acc)(x)

spilled, dtype = {{}}, getattr(torch, DTYPE)
torch.version.hip = "6.4" if TARGET == "gfx942" else None
with torch.device("meta"), fused.backend.use("triton"), kernels.catch_launches() as caught:
    globals()[SELECTED](dtype)
for launch in caught:
    name = launch.kernel.__name__
    compiled = kernels.compile_launch(launch, TARGET)
    spilled[name] = max(spilled.get(name, 0), compiled.spilled)
print(json.dumps(spilled))
"""


def run(code: str, **values: Any) -> Any:
    for name, value in values.items():
        code = code.replace(name, repr(value))
    result = python(code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def report(operation: str, case: str | None) -> list[dict[str, Any]]:
    """The kernel report's rows; it has compiled every one of them for every target."""
    rows = run(REPORT, OPERATIONS=[operation], ONLY=case and [case])
    assert rows and all(list(row["targets"]) == TARGETS for row in rows)
    return rows


def moved(code: dict[str, Any], least: int = 0) -> int:
    """Bytes a thread moves by accesses of at least `least` bytes."""
    accesses = [*code["loads"].items(), *code["stores"].items()]
    return sum(int(width) * n for width, n in accesses if int(width) >= least)


def check_nothing_is_spilled(rows: list[dict[str, Any]]) -> None:
    spilled = [
        (r["kernel"], r["case"], t) for r in rows for t in TARGETS if r["targets"][t]["spilled"]
    ]
    assert not spilled


def check_accesses_of_16_bytes(rows: list[dict[str, Any]]) -> None:
    """What streams a tensor does so 16 bytes at a time, in the loop that does it."""
    streams = [r for r in rows if r["reads"] + r["writes"] >= 0.9]
    assert streams
    for row in streams:
        for target in ("sm_90", "sm_100"):
            compiled = row["targets"][target]
            parts = compiled["loops"] or [compiled["code"]]
            # A loop over rows has a few narrow accesses besides: of a row's target, for one.
            wide = [part for part in parts if moved(part, 16) >= 0.8 * moved(part)]
            assert any(part["loads"] for part in wide), (row["kernel"], row["case"], parts)
            if row["writes"] >= 0.9:
                assert any(part["stores"] for part in wide), (row["kernel"], row["case"], parts)


AS_LAUNCHED = f"""
import json, os, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, triton
from tests.emulator.driver import Driver
Driver(90).activate()
compile, asked = triton.compile, []
def asking(source, target=None, options=None, **rest):
    asked.append([source.name, source.hash(), sorted(map(repr, options.items()))])
    return compile(source, target=target, options=options, **rest)
triton.compile = triton.compiler.compile = asking
import fused
from bench import kernels, runner

def step(device):
    x = torch.zeros(32, 27, device=device, requires_grad=True)
    v = [torch.ones(27, device=device) for _ in range(4)]
    y = fused.batch_norm(x, *v, True, activation="tanh")
    fused.cross_entropy(y, torch.zeros(32, dtype=torch.int64, device=device)).backward()

with fused.backend.use("triton"):
    step("cpu")  # the emulator's device
    launched = list(asked)
    with kernels.catch_launches() as launches:
        step("meta")
asked.clear()
for launch in launches:
    launch.compile(kernels.TARGETS["sm_90"])
reported = list(asked)
asked.clear()
op = runner.operations(["cross_entropy"])["cross_entropy"]
kernels.build([(op, case) for case in op.cases("quick") if str(case) == "32x27-f32"], 1)
print(json.dumps([launched, reported, asked]))
"""


def test_what_is_compiled_beforehand_is_what_a_launch_compiles() -> None:
    """By the kernel report, and by the benchmark on a GPU: the same entries of Triton's cache."""
    launched, reported, built = run(AS_LAUNCHED)
    assert len(launched) == 4
    assert launched == reported
    assert built == [entry for entry in launched if "cross_entropy" in entry[0]]


def test_every_launch_says_whether_products_and_sums_contract() -> None:
    """Triton's own choice changes with 3.10, and until then it warns: kernel[grid](...)."""
    launches = {}
    for path in ROOT.joinpath("kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                said = {keyword.arg for keyword in node.keywords}
                launches[path.name, node.lineno] = "enable_fp_fusion" in said
    assert len(launches) >= 16
    assert all(launches.values()), launches


def test_no_kernel_adds_up_in_the_order_of_arrival() -> None:
    """Which only a GPU would show: without atomics two runs are equal to the last bit.

    The batch counter is a whole number: its sums are exact.
    """
    for path in ROOT.joinpath("kernels").glob("*.py"):
        code = path.read_text().replace("tl.atomic_add(tracked_ptr", "")
        assert "tl.atomic" not in code, path


def asked(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Reads and writes of each launch, in units of the tensor."""
    return {row["kernel"]: (round(row["reads"], 1), round(row["writes"], 1)) for row in rows}


def test_cross_entropy_streams_without_spills() -> None:
    rows = report("cross_entropy", "16384x32000-bf16")
    check_nothing_is_spilled(rows)
    check_accesses_of_16_bytes(rows)
    # A read of each logit for the sums, one, from L2, for the gradient, and its write.
    assert asked(rows) == {
        "cross_entropy_fwd": (2.0, 1.0),
        "cross_entropy_sum": (0.0, 0.0),
        "cross_entropy_scale": (0.0, 0.0),
    }


@pytest.mark.parametrize(
    "case, targets, reads", [("8x21x512x512-bf16", 0.2, 1.3), ("8x150x128x128-bf16", 0.0, 1.0)]
)
def test_cross_entropy_of_images_reads_neighbours_side_by_side(case, targets, reads) -> None:
    """A thread has classes of one row, which it reads once. (Of 21 classes, 42 bytes, the target's
    8 are a fifth more, each time that it is read.)"""
    rows = report("cross_entropy", case)
    check_nothing_is_spilled(rows)
    assert asked(rows) == {
        "cross_entropy_count": (targets, 0.0),
        "cross_entropy_fwd": (reads, 1.0),
        "cross_entropy_sum": (0.0, 0.0),
        "cross_entropy_scale": (0.0, 0.0),
    }
    (forward,) = [row for row in rows if row["kernel"] == "cross_entropy_fwd"]
    for target in ("sm_80", "sm_90", "sm_100"):
        compiled = forward["targets"][target]
        over_rows = compiled["loops"][-1]
        elements = over_rows["stores"]["2"]
        # A read and a write an element, and what one takes of what the device has to give.
        assert elements in (16, 32) and elements <= over_rows["loads"]["2"] <= elements + 1
        assert over_rows["instructions"] <= 36 * elements
        assert compiled["programs"] * compiled["warps"] >= 24


@pytest.mark.skipif(
    not tuning.clusters_reduce(torch.device("meta")),
    reason="reductions over the blocks of a cluster take Triton 3.9",
)
def test_blocks_of_a_cluster_hold_a_part_of_the_row_each() -> None:
    rows = run(REPORT, OPERATIONS=["cross_entropy"], ONLY=["16x32000-bf16-clusters"])
    shared = rows[0]["targets"]
    assert list(shared) == ["sm_90", "sm_100"]
    for compiled in shared.values():
        assert compiled["spilled"] == 0
        # 32,768 classes over 8 blocks of 256 threads: 16 each, which two accesses read, and write.
        over_rows = compiled["loops"][-1]
        assert over_rows["loads"]["16"] == over_rows["stores"]["16"] == 2


def test_batch_norm_streams_without_spills() -> None:
    rows = report("batch_norm", "4096x1024-bf16-tanh")
    check_nothing_is_spilled(rows)
    check_accesses_of_16_bytes(rows)
    # The second reading is from a cache.
    assert asked(rows) == {"batch_norm_fwd": (2.0, 1.0), "batch_norm_bwd": (4.0, 1.0)}


def test_batch_norm_of_rows_of_100_bytes_streams() -> None:
    """Four of them are seen as one."""
    rows = report("batch_norm", "125000x50-bf16-tanh")
    check_nothing_is_spilled(rows)
    check_accesses_of_16_bytes(rows)


def test_batch_norm_of_rows_of_98_bytes_streams() -> None:
    """Eight channels are seen as one, of which forward holds the 32 images."""
    forward, backward = report("batch_norm", "32x2048x7x7-bf16-relu")
    check_nothing_is_spilled([forward, backward])
    check_accesses_of_16_bytes([backward])
    for target in ("sm_80", "sm_90", "sm_100"):
        compiled = forward["targets"][target]
        held = 32 * 512 * 2 // (32 * compiled["warps"])  # bytes a thread
        for accesses in (compiled["code"]["loads"], compiled["code"]["stores"]):
            assert 16 * accesses["16"] == held
            assert all(int(width) <= 4 for width in accesses if width != "16")  # of channels


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["cross_entropy", "batch_norm"])
def test_every_case_compiles_without_spills(operation) -> None:
    check_nothing_is_spilled(report(operation, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", ["cross_entropy", "vocab_parallel_cross_entropy", "batch_norm"]
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_option_compiles(target, dtype, operation) -> None:
    spilled = run(OPTIONS, SELECTED=operation, TARGET=target, DTYPE=dtype)
    assert spilled and (dtype == "float64" or not any(spilled.values()))
