"""Which plan of `kernels/tuning.py` a shape takes, and the plans that are off by default."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fused
from tests.test_cross_entropy import check_against_torch, example

pytest.importorskip("triton")

import triton.language as tl

from fused.kernels import cross_entropy_tile as tile
from fused.kernels import tuning


def blocks(rows: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of a cluster, that share a row."""
    return tuning.cross_entropy(torch.empty(rows, classes, 1, dtype=dtype, device="meta")).num_ctas


def test_short_rows_that_begin_anywhere() -> None:
    """Several threads of one row each, as many rows as fill the warps."""

    def threads(rows: int, classes: int) -> int:
        x = torch.empty(rows, classes, 1, dtype=torch.bfloat16, device="meta")
        plan = tuning.cross_entropy(x)
        assert not plan.THREADS or plan.THREADS * plan.BLOCK_N == 32 * plan.num_warps
        return plan.THREADS

    # 64 classes are groups of 16 bytes.
    found = [threads(4096, c) for c in (2, 3, 10, 27, 64, 65, 127, 129)]
    assert found == [0, 2, 4, 8, 0, 16, 16, 0]
    assert [threads(n, 27) for n in (1, 4, 32)] == [0, 8, 8]


# Multiprocessors, bytes of L2, threads and programs of a multiprocessor, threads of a warp
GPUS = {
    "T4": (40, 4 * 2**20, 1024, 16, 32),
    "RTX 3090": (82, 6 * 2**20, 1536, 16, 32),
    "H100": (132, 50 * 2**20, 2048, 32, 32),
    "MI300": (304, 4 * 2**20, 2048, 32, 64),
}
SHAPES = [(4, 2, 1), (9000, 27, 1), (9000, 300, 1), (9000, 1000, 1), (9000, 50257, 1),
          (8, 3, 999), (8, 21, 9999), (8, 150, 9999), (8, 9000, 99)]  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_for_other_gpus(shape, dtype, gpu, monkeypatch) -> None:
    """A thread's work is what it is on an H100, also of wider warps, and all programs are resident
    as far as their threads go."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    usual, device = tuning.cross_entropy(x), tuning._Device(*GPUS[gpu])
    monkeypatch.setattr(tuning, "_device", lambda _: device)
    plan = tuning.cross_entropy(x)
    if usual.HELD:  # else L2 has its say
        assert (plan.BLOCK_N, plan.BLOCK_C) == (usual.BLOCK_N, usual.BLOCK_C)
        assert device.warp * plan.num_warps == max(device.warp, 32 * usual.num_warps)
    elif plan.LANES > 1:
        assert device.warp * plan.num_warps == plan.LANES
    together = -(-plan.n_programs // device.processors)
    assert plan.num_warps >= 1 and plan.n_programs >= 1
    assert device.warp * plan.num_warps * together <= device.threads
    assert together <= device.programs


def test_what_plans_ask_of_a_gpu(monkeypatch) -> None:
    properties = SimpleNamespace(
        multi_processor_count=82, L2_cache_size=6 * 2**20, max_threads_per_multi_processor=1536,
        warp_size=32, major=8, minor=6,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    ask = tuning._properties.__wrapped__
    assert ask(torch.device("cuda")) == GPUS["RTX 3090"]
    properties.minor = 9  # RTX 4090
    assert ask(torch.device("cuda"))[3] == 24
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties.warp_size, properties.max_threads_per_multi_processor = 64, 2048
    assert ask(torch.device("cuda"))[2:] == (2048, 32, 64)


@pytest.mark.interpreted("the form of a tile is set while kernels are read")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are read once a process")
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(33, 27), (3, 21, 5), (2, 300, 7), (2, 1100, 5)], ids=str)
def test_tiles_the_other_way_round(shape, kind, monkeypatch, device) -> None:
    """As other releases of Triton want them."""
    monkeypatch.setattr(tile, "_REVERSED", tl.constexpr(not tile._REVERSED.value))
    logits, target, weight = example(shape, torch.float32, device, kind, weighted=True)
    with fused.backend.use("triton"):
        for options in ({}, {"reduction": "none", "label_smoothing": 0.1, "softcap": 3.0}):
            check_against_torch(logits, target, weight, "triton", **options)
        prediction = fused.cross_entropy_with_stats(logits, target).prediction
    counted = torch.ones_like(prediction) > 0 if kind == "probabilities" else target != -100
    torch.testing.assert_close(prediction, torch.where(counted, logits.argmax(1), -1))


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device and with a compiler that have them."""
    monkeypatch.setattr(tuning, "CLUSTERS", True)
    monkeypatch.setattr(tuning, "clusters_reduce", lambda device: True)


def test_no_clusters_unless_asked_for() -> None:
    assert not tuning.CLUSTERS
    assert blocks(1, 131072) == 1


@pytest.mark.parametrize("can", [False, True])
def test_no_clusters_where_there_are_none(can, clusters, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "clusters_reduce", lambda device: can)
    assert blocks(1, 131072) == (16 if can else 1)


def test_clusters_for_few_rows_and_for_rows_beyond_l2(clusters) -> None:
    # One block holds 8,192 classes; 16 hold 131,072.
    assert [blocks(1, c) for c in (8192, 8193, 131072, 131073)] == [1, 16, 16, 1]
    # Half of the multiprocessors have no row; as many blocks as leave none without.
    assert [blocks(n, 16384) for n in (8, 9, 33, 66, 67)] == [16, 8, 4, 2, 1]
    # Two thirds of L2: one row of every multiprocessor.
    assert [blocks(4096, c, torch.float32) for c in (66190, 66200)] == [1, 16]
    assert blocks(4096, 131072) == 1


@pytest.mark.parametrize(
    "kind, dtype, options",
    [
        ("indices", torch.float32, {}),
        ("indices", torch.float32, {"label_smoothing": 0.1, "softcap": 5.0}),
        ("indices", torch.bfloat16, {"reduction": "none", "z_loss": 0.1}),
        ("probabilities", torch.float32, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 16384), (2, 8201)], ids=str)
def test_clusters_match_torch(shape, kind, dtype, options, monkeypatch, device) -> None:
    """Rows with and without edges. How blocks wait shows where kernels are compiled, alone."""
    monkeypatch.setattr(tuning, "CLUSTERS", True)
    logits, target, weight = example(shape, dtype, device, kind, weighted="softcap" in options)
    plan = tuning.cross_entropy(logits.unsqueeze(2))
    if plan.num_ctas == 1:
        pytest.skip("this device or this Triton has no clusters that reduce")
    assert plan.HELD and plan.EDGES == (shape[1] == 8201)
    with fused.backend.use("triton"):
        check_against_torch(logits, target, weight, "triton", **options)


def test_every_barrier_of_a_cluster_is_needed(monkeypatch, device, pytestconfig) -> None:
    """Taken out of the compiled kernel, one at a time, each is missed."""
    if not pytestconfig.getoption("--compiled") or not tuning.clusters_reduce(device):
        pytest.skip("takes compiled kernels (--compiled) and Triton 3.9")
    from tests.emulator import driver
    from tests.emulator.memory import Fault

    barrier = re.compile(r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;")
    launch = driver.launch
    found: list[re.Match[str]] = []

    def without(missing: int | None, text: str, *arguments) -> None:
        places = list(barrier.finditer(text))
        if places:
            found[:] = places
        if places and missing is not None:
            text = text[: places[missing].start()] + text[places[missing].end() :]
        launch(text, *arguments)

    def loss(missing: int | None) -> None:
        monkeypatch.setattr(driver, "launch", partial(without, missing))
        with fused.backend.use("triton"):
            fused.cross_entropy(logits, target)

    monkeypatch.setattr(tuning, "CLUSTERS", True)
    logits, target, _ = example((3, 16384), torch.float32, device)
    loss(None)
    assert len(found) == 6
    for missing in range(len(found)):
        with pytest.raises(Fault, match="shared memory"):
            loss(missing)


def test_clusters_in_place(monkeypatch, device) -> None:
    """Where a program has several rows: each block writes over what it alone has read."""
    monkeypatch.setattr(tuning, "CLUSTERS", True)
    monkeypatch.setattr(tuning, "INTERPRETED_PROGRAMS", 1)
    logits, target, _ = example((3, 16384), torch.float32, device)
    if tuning.cross_entropy(logits.unsqueeze(2)).num_ctas == 1:
        pytest.skip("this device or this Triton has no clusters that reduce")

    def gradient(inplace: bool) -> torch.Tensor:
        x = logits.clone().requires_grad_()
        own = x * 1  # what an operation made may be overwritten
        with fused.backend.use("triton"):
            loss = fused.cross_entropy(own, target, inplace=inplace)
        (dx,) = torch.autograd.grad(loss, x)
        return dx

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)
