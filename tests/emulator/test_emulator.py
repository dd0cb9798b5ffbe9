"""The emulator itself, on PTX written by hand: every check finds what it is for, and only that."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.emulator import machine
from tests.emulator.memory import Fault, Memory
from tests.emulator.ptx import parse

HEADER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 x,
	.param .u64 .ptr .global .align 1 y
)
.reqntid {threads}{cluster}
{{
	.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<8>;
	ld.param.b64 %d0, [x];
	ld.param.b64 %d1, [y];
	mov.u32 %r0, %tid.x;
	shl.b32 %r1, %r0, 2;
	cvt.u64.u32 %d2, %r1;
	add.s64 %d3, %d0, %d2;
	add.s64 %d4, %d1, %d2;
	.loc 1 7 0 // kernel.py:7:0
"""
X, Y = 4096, 8192  # where the two arrays begin


def emulate(
    body: str, x, y, threads: int = 32, blocks: int = 1, shared: int = 0, early=False, cluster=1
):
    """y after a launch. In `body` thread %r0 has the addresses of x in %d0, of x[%r0] (4 bytes an
    element) in %d3, of y in %d1 and of y[%r0] in %d4; 4 * %r0 is in %r1."""
    memory = Memory("global", 3 * 4096, threads, True, cluster)
    for start, array in ((X, x), (Y, y)):
        memory.bytes[start : start + array.nbytes] = (
            np.ascontiguousarray(array).view(np.uint8).ravel()
        )
        memory.allow(start, array.nbytes)
    clusters = f"\n.reqnctapercluster {cluster}" if cluster > 1 else ""
    kernel = parse(HEADER.format(threads=threads, cluster=clusters) + body + "\n\tret;\n}")
    parameters = [np.array([start], np.uint64) for start in (X, Y)]
    machine.run(kernel, parameters, (blocks, 1, 1), shared, memory, early)
    return memory.bytes[Y : Y + y.nbytes].view(y.dtype).reshape(y.shape)


def numbers(count: int) -> np.ndarray:
    return np.arange(100, 100 + count, dtype=np.uint32)


def empty(count: int) -> np.ndarray:
    return np.zeros(count, np.uint32)


COPY = "ld.global.b32 %r2, [%d3]; st.global.b32 [%d4], %r2;"


def test_copy() -> None:
    assert (emulate(COPY, numbers(64), empty(64), threads=64) == numbers(64)).all()


@pytest.mark.parametrize("x, y", [(31, 32), (32, 31)])
def test_an_access_beyond_a_tensor(x, y) -> None:
    line = HEADER.count("\n") + 1
    with pytest.raises(Fault, match=f"outside of global memory: kernel.py:7, line {line} "):
        emulate(COPY, numbers(x), empty(y))


def test_guards_keep_threads_out() -> None:
    body = "setp.lt.u32 %p1, %r0, 31; @%p1 ld.global.b32 %r2, [%d3]; @!%p1 mov.b32 %r2, 5;"
    result = emulate(body + "st.global.b32 [%d4], %r2;", numbers(31), empty(32))
    assert result.tolist() == [*numbers(31), 5]


@pytest.mark.parametrize("shared", [0, 124])
def test_an_access_beyond_shared_memory(shared) -> None:
    """Whose size is rounded up to 16 bytes; that of the next block is none of this one's."""
    body = "mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 0; @%p1 st.shared.b32 [%r1+4], %r1;"
    with pytest.raises(Fault, match="outside of shared memory"):
        emulate(body, empty(1), empty(1), shared=shared, blocks=2)
    emulate(body, empty(1), empty(1), shared=132, blocks=2)


@pytest.mark.parametrize("offset", [4, 8])
def test_a_misaligned_vector(offset) -> None:
    body = f"ld.global.v2.b32 {{%r2, %r3}}, [%d0+{offset}]; st.global.b32 [%d4], %r3;"
    if offset == 8:
        assert (emulate(body, numbers(4), empty(32)) == 103).all()
    else:
        with pytest.raises(Fault, match="misaligned access of 8 bytes to global"):
            emulate(body, numbers(4), empty(32))


BLOCK, WARP, NONE = "bar.sync 0;", "bar.warp.sync -1;", ""


@pytest.mark.parametrize(
    "barrier, threads, enough",
    [(BLOCK, 64, True), (WARP, 64, False), (WARP, 32, True), (NONE, 64, False), (NONE, 32, False)],
)
def test_a_race_in_shared_memory(barrier, threads, enough) -> None:
    """Reversed: one thread writes, another reads; and once more, over what was read."""
    mirror = f"sub.s32 %r3, {4 * threads - 4}, %r1; ld.shared.b32 %r4, [%r3];"
    once = f"st.shared.b32 [%r1], %r1; {BLOCK} {mirror} {barrier} st.shared.b32 [%r1], 1;"
    twice = f"st.shared.b32 [%r1], %r1; {barrier} {mirror}"
    for body, word in ((once, "used and written"), (twice, "written and read")):
        body += "st.global.b32 [%d4], %r4;"
        if enough:
            result = emulate(body, empty(1), empty(threads), threads, shared=4 * threads, blocks=1)
            assert result.tolist() == [4 * (threads - 1 - k) for k in range(threads)]
        else:
            with pytest.raises(Fault, match=f"shared memory {word} without a barrier"):
                emulate(body, empty(1), empty(threads), threads, shared=4 * threads)


def test_a_race_with_one_of_two_readers() -> None:
    load = "ld.shared.b32 %r2, [global_smem];"
    body = f"""setp.eq.s32 %p1, %r0, 40; setp.eq.s32 %p2, %r0, 5;
    @%p1 {load} @%p2 {load} @%p2 st.shared.b32 [global_smem], 1;"""
    with pytest.raises(Fault, match="shared memory used and written"):
        emulate(body, empty(1), empty(1), threads=64, shared=16)


def test_two_threads_write_one_address() -> None:
    with pytest.raises(Fault, match="written differently by two threads"):
        emulate("st.global.b32 [%d1], %r0;", empty(1), empty(1))
    assert emulate("st.global.b32 [%d1], 3;", empty(1), empty(1)) == 3


CTA = "mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r0, 0; setp.eq.and.s32 %p2, %r5, 1, %p1;"


def test_blocks_are_never_in_order() -> None:
    # One block writes what the other wrote, reads what it wrote, writes what it read.
    first = "setp.eq.and.s32 %p3, %r5, 0, %p1; @%p3 "
    store, load = "st.global.b32 [%d1], %r5;", "ld.global.b32 %r6, [%d1];"
    for body in (
        f"@%p1 {store}",
        f"{first} {store} {BLOCK} @%p2 {load}",
        f"{first} {load} {BLOCK} @%p2 {load} {BLOCK} @%p2 {store}",
        f"@%p1 {load} {BLOCK} @%p2 {store}",
        f"@%p1 {load} {BLOCK} @%p2 {load} {BLOCK} @%p2 {store}",
    ):
        with pytest.raises(
            Fault, match="global memory (used and )?written (and read )?(without|differently)"
        ):
            emulate(CTA + body, empty(1), empty(1), blocks=2)
    # Nor are those that do not run side by side: 1024 threads of block 0, then of block 16.
    both = "and.b32 %r6, %r5, 15; setp.eq.and.s32 %p3, %r6, 0, %p1;"
    for body in (f"@%p3 {store}", f"@%p3 {load} setp.eq.and.s32 %p4, %r5, 16, %p3; @%p4 {store}"):
        with pytest.raises(Fault, match="global memory used and written without a barrier"):
            emulate(CTA + both + body, empty(1), empty(1), threads=1024, blocks=17)


CLUSTER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
RANK = "mov.u32 %r5, %cluster_ctarank; mov.u32 %r6, %ctaid.x; mov.u32 %r7, %cluster_nctarank;"
# What the next block of the cluster has written at one's own address.
NEXT = """add.s32 %r8, %r5, 1; rem.u32 %r8, %r8, %r7;
mapa.shared::cluster.u32 %r9, %r1, %r8; ld.shared::cluster.b32 %r10, [%r9];"""
# Thread k of block b writes 100 b + k, reads its neighbour's, and stores that at y[64 b + k].
WRITE = "mad.lo.s32 %r11, %r6, 100, %r0; st.shared.b32 [%r1], %r11;"
STORE = """mul.lo.s32 %r12, %r6, 256; cvt.u64.u32 %d5, %r12; add.s64 %d6, %d4, %d5;
st.global.b32 [%d6], %r10;"""


def test_blocks_of_a_cluster_read_each_others_shared_memory() -> None:
    """3 clusters of 4 blocks, of 2 warps: in one group, and, of 512 threads, in several."""
    body = f"{RANK} {WRITE} {CLUSTER} {NEXT} {STORE} {CLUSTER}"
    result = emulate(body, empty(1), empty(12 * 64), 64, 12, 256, cluster=4).reshape(3, 4, 64)
    blocks = np.roll(np.arange(12).reshape(3, 4), -1, axis=1)
    assert (result == 100 * blocks[:, :, None] + np.arange(64)).all()
    last = "sub.s32 %r10, %r10, %r0; setp.eq.s32 %p1, %r6, 63; @%p1 st.global.b32 [%d1], %r10;"
    wide = f"{RANK} {WRITE} {CLUSTER} {NEXT} {last} {CLUSTER}"
    assert emulate(wide, empty(1), empty(1), 512, 64, 2048, cluster=16) == 4800  # block 48's


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("instead", ["", BLOCK])
def test_a_barrier_of_a_cluster_that_is_missing(missing, instead) -> None:
    """Before another's memory is read, before one's own is written again, before it ends."""
    barriers = [instead if k == missing else CLUSTER for k in range(3)]
    body = f"{RANK} {WRITE} {barriers[0]} {NEXT} {STORE} {barriers[1]}"
    body += f"{WRITE} {CLUSTER} {NEXT} {STORE} {barriers[2]}"
    word = ["written and read", "used and written", "a block that ends while others use it"][
        missing
    ]
    with pytest.raises(Fault, match=f"shared memory (of )?{word}"):
        emulate(body, empty(1), empty(128), 64, 2, 256, cluster=2)


def test_a_barrier_orders_the_blocks_of_a_cluster_alone() -> None:
    """In global memory, too: block 0 writes, block 1 reads."""
    write = (
        "setp.eq.s32 %p1, %r0, 0; setp.eq.and.s32 %p2, %r6, 0, %p1; @%p2 st.global.b32 [%d1], 3;"
    )
    read = "setp.eq.and.s32 %p3, %r6, 1, %p1; @%p3 ld.global.b32 %r2, [%d1];"
    body = f"{RANK} {write} {CLUSTER} {read}"
    assert emulate(body, empty(1), empty(1), blocks=2, cluster=2) == 3
    with pytest.raises(Fault, match="global memory written and read"):
        emulate(body.replace("%r6, 1", "%r6, 2"), empty(1), empty(1), blocks=4, cluster=2)


def test_a_block_that_its_cluster_waits_for() -> None:
    leave = f"{RANK} setp.eq.s32 %p1, %r5, 1; @%p1 ret;"
    with pytest.raises(Fault, match="wait for others that do not come"):
        emulate(f"{leave} {CLUSTER}", empty(1), empty(1), blocks=2, cluster=2)
    emulate(f"{leave} {BLOCK}", empty(1), empty(1), blocks=2, cluster=2)


@pytest.mark.parametrize("rank, known", [(0, True), (1, True), (2, False)])
def test_a_block_that_is_not_in_the_cluster(rank, known) -> None:
    body = f"""{WRITE} {CLUSTER} mapa.shared::cluster.u32 %r9, %r1, {rank};
    ld.shared::cluster.b32 %r10, [%r9]; {CLUSTER}"""
    if known:
        emulate(body, empty(1), empty(1), 32, 4, 128, cluster=2)
        with pytest.raises(Fault, match="access outside of shared memory"):
            emulate(body.replace("[%r9]", "[%r9+4]"), empty(1), empty(1), 32, 4, 128, cluster=2)
    else:
        with pytest.raises(Fault, match="no block of the cluster: kernel.py:7"):
            emulate(body, empty(1), empty(1), 32, 4, 128, cluster=2)


@pytest.mark.parametrize(
    "barrier",
    [
        "barrier.cluster.wait.aligned;",
        f"barrier.cluster.arrive.aligned; {WRITE} barrier.cluster.wait.aligned;",
        CLUSTER.replace("arrive", "arrive.relaxed"),
    ],
)
def test_barriers_of_clusters_that_triton_does_not_make(barrier) -> None:
    with pytest.raises(NotImplementedError, match="a wait that does not follow an arrival"):
        emulate(barrier, empty(1), empty(1), blocks=2, shared=128, cluster=2)


ADD = "atom.global.gpu.relaxed.add.u32 %r2, [%d1], 3;"


def test_atomic_additions() -> None:
    """3 for every thread of 1,024 blocks, in several groups; each finds a number of its own."""
    for add in (ADD, ADD.replace("atom", "red").replace("%r2, ", "")):
        assert emulate(add, empty(1), numbers(1), blocks=1024).item() == 100 + 3 * 32 * 1024
    found = emulate(f"{ADD} st.global.b32 [%d4+4], %r2;", empty(1), empty(33))
    assert found.tolist() == [96, *range(0, 96, 3)]


@pytest.mark.parametrize("other", ["ld.global.b32 %r3, [%d1];", "st.global.b32 [%d1], 5;"])
@pytest.mark.parametrize("first", [True, False])
def test_an_atomic_addition_is_in_no_order_with_other_accesses(other, first) -> None:
    body = f"{other} {ADD}" if first else f"{ADD} {other}"
    with pytest.raises(Fault, match="global memory"):
        emulate(body, empty(1), empty(1))


@pytest.mark.parametrize(
    "readers, writer, allowed", [(64, 40, True), (32, 5, True), (32, 40, False)]
)
def test_updates(readers, writer, allowed) -> None:
    """All threads may read what one of them then writes, if its warp is among them."""
    body = f"""setp.lt.u32 %p1, %r0, {readers}; setp.eq.s32 %p2, %r0, {writer};
    @%p1 ld.global.b32 %r2, [%d1]; add.s32 %r2, %r2, 1; @%p2 st.global.b32 [%d1], %r2;"""
    if allowed:
        assert emulate(body, empty(1), np.array([8], np.uint32), threads=64) == 9
    else:
        with pytest.raises(Fault, match="used and written"):
            emulate(body, empty(1), empty(1), threads=64)


def test_a_barrier_that_some_threads_miss() -> None:
    leave = "setp.lt.u32 %p1, %r0, 5; @%p1 ret;"
    for wait in (BLOCK, WARP, "shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;"):
        with pytest.raises(Fault, match="wait for others that do not come: kernel.py:7"):
            emulate(f"{leave} {wait}", empty(1), empty(1))
        with pytest.raises(
            Fault, match="only some threads of a (warp|block) are here: kernel.py:7"
        ):
            emulate(f"setp.lt.u32 %p1, %r0, 5; @%p1 {wait}", empty(1), empty(1))
    # Of another warp, they are missed by a barrier of the block alone.
    leave = "setp.lt.u32 %p1, %r0, 32; @%p1 ret;"
    emulate(f"{leave} {WARP}", empty(1), empty(1), threads=64)
    with pytest.raises(Fault, match="do not come"):
        emulate(f"{leave} {BLOCK}", empty(1), empty(1), threads=64)


def test_a_guard_in_a_branch() -> None:
    body = """mov.b32 %r2, 0; setp.lt.u32 %p1, %r0, 8; setp.lt.u32 %p2, %r0, 16;
	@%p1 bra $done;
	@%p2 mov.b32 %r2, 1;
$done:
	st.global.b32 [%d4], %r2;"""
    assert emulate(body, empty(1), empty(32)).tolist() == [0] * 8 + [1] * 8 + [0] * 16


def test_a_loop_of_as_many_rounds_as_a_thread_likes() -> None:
    body = """mov.b32 %r2, 0; mov.b32 %r3, 0;
$again:
	setp.ge.u32 %p1, %r2, %r0;
	@%p1 bra $done;
	add.s32 %r3, %r3, %r2; add.s32 %r2, %r2, 1;
	bra.uni $again;
$done:
	bar.sync 0;
	st.global.b32 [%d4], %r3;"""
    result = emulate(body, empty(1), empty(64), threads=64, blocks=1)
    assert result.tolist() == [k * (k - 1) // 2 for k in range(64)]


ASYNC = "cp.async.ca.shared.global [%r1], [%d3], 4; cp.async.commit_group;"
TAKE = "ld.shared.b32 %r2, [%r1]; st.global.b32 [%d4], %r2;"


def test_asynchronous_copies_arrive_when_they_are_waited_for() -> None:
    def copied(wait: str, early: bool) -> bool:
        result = emulate(f"{ASYNC} {wait} {TAKE}", numbers(32), empty(32), shared=128, early=early)
        assert (result == 0).all() or (result == numbers(32)).all()
        return bool(result.any())

    assert copied("cp.async.wait_group 0;", False) and copied("cp.async.wait_group 0;", True)
    assert not copied("", False) and not copied("cp.async.wait_group 1;", False)
    assert copied("", True)
    some = f"setp.lt.u32 %p1, %r0, 5; {ASYNC} @%p1 cp.async.wait_group 0; {TAKE}"
    result = emulate(some, numbers(32), empty(32), shared=128)
    assert result.tolist() == [*numbers(5), *[0] * 27]


@pytest.mark.parametrize("early", [False, True])
def test_asynchronous_copies_race_as_others(early) -> None:
    """Over what a neighbour still reads; and read by a neighbour after the wait alone."""
    neighbour = "xor.b32 %r3, %r1, 4; ld.shared.b32 %r2, [%r3];"
    wait = "cp.async.wait_group 0;"
    for body in (
        f"{neighbour} {ASYNC} {wait}",
        f"{ASYNC} {neighbour} {wait}",
        f"{ASYNC} {wait} {neighbour}",
    ):
        with pytest.raises(Fault, match="shared memory"):
            emulate(body, numbers(32), empty(1), shared=128, early=early)
    body = f"{neighbour} {BLOCK} {ASYNC} {wait} {BLOCK} {neighbour} st.global.b32 [%d4], %r2;"
    result = emulate(body, numbers(32), empty(32), shared=128, early=early)
    assert (result == numbers(32)[np.arange(32) ^ 1]).all()


def test_asynchronous_copies_write_zeros_where_they_read_nothing() -> None:
    body = f"""setp.lt.u32 %p1, %r0, 4; selp.b32 %r5, 4, 0, %p1; st.shared.b32 [%r1], 9;
    cp.async.ca.shared.global [%r1], [%d3], 4, %r5; cp.async.commit_group;
    cp.async.wait_group 0; {TAKE}"""
    result = emulate(body, numbers(4), empty(32), shared=128)
    assert result.tolist() == [*numbers(4), *[0] * 28]


LANES: list[tuple[str, Callable[[int], int]]] = [
    ("bfly.b32 %r2, %r0, 5", lambda k: k ^ 5),
    ("idx.b32 %r2, %r0, 7", lambda k: 7),
    ("down.b32 %r2, %r0, 3", lambda k: k + 3 if k < 29 else k),
    ("up.b32 %r2, %r0, 3", lambda k: k - 3 if k >= 3 else k),
]


@pytest.mark.parametrize("how, lane", LANES, ids=[how.split(".")[0] for how, _ in LANES])
def test_shuffle(how, lane) -> None:
    clamp = 0 if how.startswith("up") else 31
    body = f"shfl.sync.{how}, {clamp}, -1; st.global.b32 [%d4], %r2;"
    expected = [lane(k % 32) + k // 32 * 32 for k in range(64)]
    assert emulate(body, empty(1), empty(64), threads=64).tolist() == expected


def test_shuffle_says_whether_a_lane_is_there() -> None:
    body = "shfl.sync.down.b32 %r2|%p1, %r0, 3, 31, -1; selp.b32 %r3, 1, 0, %p1;"
    result = emulate(body + "st.global.b32 [%d4], %r3;", empty(1), empty(32))
    assert result.tolist() == [1] * 29 + [0] * 3


def test_votes_and_reductions_of_a_warp() -> None:
    body = """setp.lt.u32 %p1, %r0, 37;
    vote.sync.ballot.b32 %r2, %p1, -1; redux.sync.max.u32 %r3, %r0, -1; add.s32 %r4, %r2, %r3;"""
    result = emulate(body + "st.global.b32 [%d4], %r4;", empty(1), empty(64), threads=64)
    assert result.tolist() == [30] * 32 + [0b11111 + 63] * 32  # 2**32 - 1 + 31


def test_mma_of_bfloat16() -> None:
    """The lanes' numbers as in PTX's description of mma.m16n8k16."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((16, 16), (16, 8), (16, 8)))
    a, b = a.bfloat16().float(), b.bfloat16().float()
    registers = np.zeros((32, 10), np.uint32)
    halves, floats = registers[:, :6].copy().view(np.uint16), np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for k in range(8):
            value = a[g + 8 * (k // 2 % 2), 2 * t + k % 2 + 8 * (k // 4)]
            halves[lane, k] = value.bfloat16().view(torch.uint16).item()
        for k in range(4):
            value = b[2 * t + k % 2 + 8 * (k // 2), g]
            halves[lane, 8 + k] = value.bfloat16().view(torch.uint16).item()
            floats[lane, k] = c[g + 8 * (k // 2), 2 * t + k % 2]
    registers[:, :6], registers[:, 6:] = halves.view(np.uint32), floats.view(np.uint32)
    loads = "".join(f"ld.global.b32 %r{k + 10}, [%d5+{4 * k}];" for k in range(10))
    stores = "".join(f"st.global.b32 [%d6+{4 * k}], %r{k + 20};" for k in range(4))
    body = f"""mul.wide.u32 %d5, %r0, 40; add.s64 %d5, %d5, %d0; {loads}
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r20, %r21, %r22, %r23}}, \
{{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
    mul.wide.u32 %d6, %r0, 16; add.s64 %d6, %d6, %d1; {stores}"""
    result = emulate(body, registers, np.zeros((32, 4), np.float32))
    expected = (a.double() @ b.double() + c).float()
    for lane in range(32):
        g, t = divmod(lane, 4)
        for k in range(4):
            assert result[lane, k] == expected[g + 8 * (k // 2), 2 * t + k % 2]


@pytest.mark.parametrize("stored", ["", ".trans"])
@pytest.mark.parametrize("loaded", ["", ".trans"])
def test_matrices_go_to_shared_memory_and_back(stored, loaded) -> None:
    """Lane 4 g + t has numbers (g, 2 t) and (g, 2 t + 1) of each of 4 matrices."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    registers = matrices.view(np.uint32).reshape(4, 32)
    loads = "".join(f"ld.global.b32 %r{k + 10}, [%d3+{128 * k}];" for k in range(4))
    stores = "".join(f"st.global.b32 [%d4+{128 * k}], %r{k + 20};" for k in range(4))
    body = f"""{loads} shl.b32 %r2, %r0, 4;
    stmatrix.sync.aligned.m8n8.x4{stored}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}}; {BLOCK}
    ldmatrix.sync.aligned.m8n8.x4{loaded}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r2]; {stores}"""
    result = emulate(body, registers, np.zeros_like(registers), shared=512)
    found = result.copy().view(np.uint16).reshape(4, 8, 8)
    assert (found == (matrices if stored == loaded else matrices.transpose(0, 2, 1))).all()


def applied(instruction: str, *columns: np.ndarray) -> np.ndarray:
    """%r9 = instruction(%r2, %r3, %r4), of 4 bytes each, an element a thread."""
    x = np.zeros((3, 32), np.uint32)
    for row, column in zip(x, columns, strict=False):
        row[: len(column)] = column.view(np.uint32)
    loads = "".join(f"ld.global.b32 %r{k + 2}, [%d3+{128 * k}];" for k in range(3))
    body = f"{loads} {instruction} st.global.b32 [%d4], %r9;"
    return emulate(body, x, empty(32))[: len(columns[0])]


@pytest.mark.parametrize("name, function", [("min", min), ("max", max)])
def test_minimum_and_maximum_with_nan(name, function) -> None:
    a = np.array([1, np.nan, 2, np.nan, -np.inf], np.float32)
    b = np.array([np.nan, 1, 3, np.nan, 4], np.float32)
    plain = applied(f"{name}.f32 %r9, %r2, %r3;", a, b).view(np.float32)
    nan = applied(f"{name}.NaN.f32 %r9, %r2, %r3;", a, b).view(np.float32)
    last = [function(2, 3), np.nan, function(-np.inf, 4)]
    np.testing.assert_array_equal(plain, np.array([1, 1, *last], np.float32))
    np.testing.assert_array_equal(nan, np.array([np.nan, np.nan, *last], np.float32))


def test_a_result_that_is_nan_has_the_hardwares_bits() -> None:
    """Whatever the signs and the order of what it is of: threads write the same to one place."""
    inf, nan = np.float32(np.inf), np.array([0xFFC00001], np.uint32).view(np.float32)[0]
    a, b = np.array([inf, -inf, nan, 1], np.float32), np.array([-inf, inf, 1, nan], np.float32)
    found = applied("add.f32 %r9, %r2, %r3;", a, b).view(np.uint32)
    assert (found == 0x7FFFFFFF).all()
    moved = applied("mov.b32 %r9, %r2;", a).view(np.uint32)
    np.testing.assert_array_equal(moved, a.view(np.uint32))


def test_bfloat16_rounds_ties_to_even() -> None:
    last = 2.0**-7  # place of bfloat16 at 1
    ties = [1 + last / 2, 1 + 3 * last / 2, -1 - last / 2, 1 + last / 2 + 2.0**-23]
    x = np.array([*ties, 1e-40, 3.4e38, np.inf, -np.inf, 0.0, -0.0], np.float32)
    bits = applied("cvt.rn.bf16.f32 %h1, %r2; mov.b32 %r9, {%h1, %h1};", x).view(np.uint16)
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    assert (bits[::2] == expected).all() and (bits[1::2] == expected).all()
    one, two = np.array([[1], [2]], np.float32)
    pair = applied("cvt.rn.bf16x2.f32 %r9, %r2, %r3;", two, one).view(np.uint16)
    assert pair.tolist() == [0x3F80, 0x4000]  # the first operand is the upper half


def test_fma_rounds_once() -> None:
    a = np.array([1 + 2.0**-23], np.float32)
    c = np.array([-1 - 2.0**-22], np.float32)
    assert applied("fma.rn.f32 %r9, %r2, %r2, %r3;", a, c).view(np.float32) == 2.0**-46
    rounded = "mul.rn.f32 %r5, %r2, %r2; add.rn.f32 %r9, %r5, %r3;"
    assert applied(rounded, a, c).view(np.float32) == 0


def test_a_comparison_with_nan() -> None:
    a, b = np.array([1, np.nan, 2], np.float32), np.array([2, 1, 2], np.float32)
    for how, expected in (
        ("lt", [1, 0, 0]),
        ("ltu", [1, 1, 0]),
        ("neu", [1, 1, 0]),
        ("ne", [1, 0, 0]),
        ("nan", [0, 1, 0]),
        ("num", [1, 0, 1]),
    ):
        body = f"setp.{how}.f32 %p1, %r2, %r3; selp.b32 %r9, 1, 0, %p1;"
        assert applied(body, a, b).tolist() == expected


WHOLE: list[tuple[str, int, int, int]] = [
    ("shl.b32 %r9, %r2, %r3;", 3, 32, 0),
    ("shl.b32 %r9, %r2, %r3;", 3, 31, 2**31),
    ("shr.u32 %r9, %r2, %r3;", -1, 40, 0),
    ("shr.s32 %r9, %r2, %r3;", -8, 40, -1),
    ("shr.s32 %r9, %r2, %r3;", -8, 1, -4),
    ("div.s32 %r9, %r2, %r3;", -7, 2, -3),
    ("rem.s32 %r9, %r2, %r3;", -7, 2, -1),
    ("div.u32 %r9, %r2, %r3;", -7, 2, 2**31 - 4),
    ("mul.hi.u32 %r9, %r2, %r3;", -1, -1, 2**32 - 2),
    ("mul.hi.s32 %r9, %r2, %r3;", -1, 5, -1),
    ("mad.lo.s32 %r9, %r2, %r3, 7;", -3, 5, -8),
    ("bfe.u32 %r9, %r2, 4, 8;", 0xABCD, 0, 0xBC),
    ("bfe.s32 %r9, %r2, 4, 8;", 0xABCD, 0, 0xBC - 256),
    ("prmt.b32 %r9, %r2, %r3, 0x5410;", 0x11112222, 0x33334444, 0x44442222),
    ("prmt.b32 %r9, %r2, %r3, 0x8080;", 0x11112280, 0, 0xFF80FF80),
    ("cvt.u16.u32 %h1, %r2; cvt.s32.s16 %r9, %h1;", 0x18000, 0, -0x8000),
]


@pytest.mark.parametrize("instruction, a, b, expected", WHOLE, ids=str)
def test_whole_numbers(instruction, a, b, expected) -> None:
    columns = [np.array([value % 2**32], np.uint32) for value in (a, b)]
    assert applied(instruction, *columns) == expected % 2**32


@pytest.mark.parametrize(
    "instruction",
    [
        "atom.global.gpu.relaxed.add.f32 %r2, [%d1], %r3;",
        "bar.arrive 0, 32;",
        "ld.local.b32 %r2, [%r1];",
    ],
)
def test_refuses_what_it_does_not_know(instruction) -> None:
    with pytest.raises(NotImplementedError, match=instruction[:4]):
        emulate(instruction, empty(1), empty(1))
