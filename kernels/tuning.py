"""Block sizes and warps of every kernel: the only place that makes them of a shape and a dtype."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(n: int, d: int) -> int:
    return (n + d - 1) // d


# Whether blocks of a cluster may share a row of cross-entropy, where device and compiler can. Off
# until a GPU has timed it: docs/performance.md says what the compiler makes of it. Set it to try.
CLUSTERS = False
# Programs of cross-entropy in the interpreter: two, so that in a small grid, too, one has several
# tiles. None for as many as on a GPU.
INTERPRETED_PROGRAMS: int | None = 2


@dataclass(frozen=True)
class CrossEntropyPlan:
    """Tiles of BLOCK_N rows and BLOCK_C classes, and how many programs share them."""

    BLOCK_N: int
    BLOCK_C: int
    LANES: int  # parts of a row that keep statistics of their own until it ends
    VEC: int  # classes in one access
    EDGES: bool  # whether rows begin and end anywhere, between the full accesses
    HELD: bool  # whether a row is one tile, so that it is read once
    THREADS: int  # side by side on each of several rows; 0 leaves that to the compiler
    PARTS: int  # of a row whose neighbours are rows: every PARTS-th class is in the same thread
    num_warps: int
    num_ctas: int  # blocks of a cluster, which make one program
    n_programs: int
    BLOCK_COUNT: int  # targets counted at a time: 8 a thread, all in flight together
    options: dict[str, int]  # the compiler's

    @property
    def max_rows_to_count(self) -> int:
        """Up to 4 such steps every program counts for itself: less than a launch would take."""
        return 4 * self.BLOCK_COUNT


def cross_entropy(
    x: torch.Tensor, inplace: bool = False, clusters: bool = True
) -> CrossEntropyPlan:
    """For logits x (N, C, S), whose gradient is written to torch.empty_like(x), or if `inplace`
    over them or nowhere; a program owns whole rows, and is a cluster only if `clusters`.

    Nothing else of a call decides, neither its target nor what it asks for: kernels that take
    the same logits then divide a sum alike, and find it equal to the last bit.
    """
    n_rows, n_classes, size = x.shape[0] * x.shape[2], x.shape[1], x.dtype.itemsize
    device = _device(x.device)
    processors, l2 = device.processors, device.l2
    num_ctas, threads, parts = 1, 0, 1
    options: dict[str, int] = {}
    if x.stride(1) != 1 and x.shape[2] > 1:
        # (N, C, S): neighbours in memory are rows. 128 bytes of them are one full access of a warp.
        vec, edges, lanes, threads = 1, False, 1, 1
        # 16 numbers a thread of 256 take 64 registers; 32 numbers of one row, where no other thread
        # has any of it, take no more. A sector of memory is the narrowest that is read.
        block_c, most = next_power_of_2(n_classes), 4096 if size <= 4 else 2048
        held = 32 * block_c <= most * size
        if held:
            block_n = min(128 // size, most // block_c, next_power_of_2(n_rows))
            n_threads = block_n if block_c <= 32 else block_n * block_c // 16
            resident = 1536 if block_c <= 16 else 1024
        else:
            # Registers let three programs be resident (of 16 numbers a thread two, and every option
            # spilled). Their rows are as wide as all of their classes fit L2, two thirds of it;
            # beyond, the second read comes from memory, whatever is done.
            per_processor, n_threads = 3, 256
            resident = per_processor * n_threads
            most_bytes = 2 * l2 // (3 * per_processor * processors * n_classes)
            width = next((w for w in (128, 64, 32) if w <= most_bytes), 128)
            block_n = min(width // size, next_power_of_2(n_rows))
            block_c = most // (2 * block_n)
            if not torch.version.hip:  # it would rather spill some bytes, with every option
                options = {"maxnreg": 96}
        parts = min(block_c, max(1, max(device.warp, n_threads) // block_n))
    else:
        vec, edges = _accesses(x, inplace)
        block_c = next_power_of_2(n_classes)
        num_ctas = _blocks_a_row(x) if clusters else 1
        # 16 numbers a thread in up to 16 warps: about 48 registers in bfloat16, so that 40 warps
        # are resident and some read while others compute. 32 a thread took 96 to 127.
        held = block_c * max(size, 4) <= 32768 * num_ctas
        if held:
            # Up to 8 rows a thread do not spill. What such a tile holds takes one launch.
            block_n = next_power_of_2(n_rows)
            one_program = block_n <= 32 and block_n * block_c <= 2048
            if not one_program:
                block_n = max(1, 512 // block_c) if block_c <= 128 else 1
            elements = block_n * block_c // num_ctas
            n_threads = min(max(128, elements // 4) if block_n > 1 else elements // 16, 512)
            if vec == 1 and block_n > 1 and 4 <= block_c <= 128:
                # 4 or 8 classes of one row a thread, and 8 or 16 neighbours in memory at a time.
                threads = max(2, block_c // (4 if block_c <= 32 else 8))
                block_n = block_n if one_program else 128 // threads
                n_threads = block_n * threads
            # As many programs as are resident, by registers: one more would begin when others end,
            # and be the last alone. Small tiles take fewer registers.
            resident = 2048 if block_n > 1 else 1024 if n_threads == 512 else 1536
            lanes = 1
        else:
            # Two accesses of 16 bytes a thread in flight, four where one program is alone on its
            # multiprocessor because the rows in flight, which are read twice, have to fit L2: two
            # thirds of it, as the gradient passes through it too.
            per_processor = 1 if 3 * processors * n_classes * size > l2 else 2
            block_n, n_threads = 1, 512
            block_c = (32768 if per_processor == 1 else 16384) // size
            lanes, resident = n_threads, per_processor * n_threads
    num_warps = max(1, n_threads // device.warp)
    resident = min(resident, device.threads) // (num_warps * device.warp)
    programs = processors * max(1, min(resident, device.programs)) // num_ctas
    tiles = max(1, _ceil_div(n_rows, block_n))
    n_programs = min(tiles, INTERPRETED_PROGRAMS or programs if x.is_cpu else programs)
    return CrossEntropyPlan(
        block_n, block_c, lanes, vec, edges, held, threads, parts, num_warps, num_ctas,
        n_programs, 8 * device.warp * num_warps, options,
    )  # fmt: skip


def _blocks_a_row(x: torch.Tensor) -> int:
    """How many blocks of a cluster hold a row of x together, 1 where clusters are of no use."""
    n_rows, n_classes, size = x.shape[0] * x.shape[2], x.shape[1], x.dtype.itemsize
    device = _device(x.device)
    processors, l2 = device.processors, device.l2
    least = next_power_of_2(n_classes) * max(size, 4) // 32768
    if not (CLUSTERS and 1 < least <= 16 and clusters_reduce(x.device)):
        return 1
    # Blocks that wait for each other four times a row are predicted to cost more than a second read
    # from L2. So only where there are too few rows for half of the multiprocessors, or one for each
    # does not fit L2, two thirds of it.
    if 2 * n_rows > processors and 3 * processors * n_classes * size <= 2 * l2:
        return 1
    blocks = least
    while blocks < 16 and 2 * blocks * n_rows <= processors:
        blocks *= 2
    return blocks


def _accesses(x: torch.Tensor, inplace: bool) -> tuple[int, bool]:
    """(VEC, EDGES): 16 bytes an access, if rows of x and of its gradient allow for it."""
    n_classes, vec = x.shape[1], 16 // x.dtype.itemsize
    if x.stride(1) != 1 or x.data_ptr() % 16:
        return 1, False
    if x.shape[2] > 1 and x.stride(2) < n_classes:
        return 1, False  # rows share memory; those of empty_like(x) may lie in another order
    if (
        n_classes % vec == 0
        and x.stride(0) % vec == 0
        and (x.shape[2] == 1 or x.stride(2) % vec == 0)
    ):
        return vec, False
    # The edges are a tile of their own: little beside so many classes. A row's are where its
    # gradient's are: rows lie one behind the other, in either order.
    if n_classes >= 4096 and (
        inplace or x.transpose(1, 2).is_contiguous() or x.permute(2, 0, 1).is_contiguous()
    ):
        return vec, True
    return 1, False


@dataclass(frozen=True)
class Pass:
    """A pass over numbers, BLOCK at a time."""

    BLOCK: int
    num_warps: int
    n_programs: int


def count(n_rows: int) -> Pass:
    """Over the targets of `n_rows`, for the mean: 4 steps of 8 targets a thread."""
    return Pass(2048, 8, min(_ceil_div(n_rows, 8192), 512))


def scale(n: int, device: torch.device) -> Pass:
    """Over `n` numbers, where there is mostly nothing to do."""
    # Few programs: all that most calls cost is to start them.
    block = 8192
    return Pass(block, 8, min(_ceil_div(n, block), 4 * multiprocessors(device)))


def merge(n_rows: int) -> Pass:
    """Over the shards of `n_rows`: a row a thread, in many programs, as all of it is latency."""
    return Pass(128, 4, _ceil_div(n_rows, 128))


def multiprocessors(device: torch.device) -> int:
    """How many the device has; an H100 where there is no device."""
    return _device(device).processors


class _Device(NamedTuple):
    """What plans ask of a GPU."""

    processors: int  # multiprocessors
    l2: int  # bytes
    threads: int  # that a multiprocessor may have
    programs: int  # that it may have
    warp: int  # threads


def _device(device: torch.device) -> _Device:
    """An H100's numbers where there is no device, with AMD's waves where PyTorch is one for AMD."""
    if device.type != "cuda":
        return _Device(132, 50 * 2**20, 2048, 32, 64 if torch.version.hip else 32)
    return _properties(device)


@functools.cache
def _properties(device: torch.device) -> _Device:
    of = torch.cuda.get_device_properties(device)
    threads = of.max_threads_per_multi_processor
    # One for 64 threads, by CUDA's table of compute capabilities, but for 8.6 and 8.7.
    few = not torch.version.hip and (of.major, of.minor) in ((8, 6), (8, 7))
    return _Device(
        of.multi_processor_count,
        of.L2_cache_size,
        threads,
        16 if few else threads // 64,
        of.warp_size if torch.version.hip else 32,
    )


@functools.cache
def _triton() -> tuple[int, int]:
    """Triton's version."""
    import triton  # not above: plans are also looked at where there is none

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def last_dimension_first() -> bool:
    """Which dimension of a tile Triton lays side by side where it knows of no neighbours in memory:
    the last; before 3.7 it was the first."""
    return _triton() >= (3, 7)


# AMD's GPUs with matrix instructions of waves of 64 lanes: MI100 to MI300 and their successors.
_MFMA = ("gfx908", "gfx90a", "gfx94", "gfx95")


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """Whether the device has the tensor cores, or matrix cores, that mlp_train.py is laid out for,
    and Triton makes code for them."""
    if device.type != "cuda":
        return True
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(_MFMA)
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def clusters_reduce(device: torch.device) -> bool:
    """Whether the blocks of a cluster can share a reduction, on this device and in this Triton."""
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return True  # the interpreter knows no blocks
    # Up to 3.7 such reductions do not compile; 3.8 lets a block end while others still read its
    # shared memory.
    if _triton() < (3, 9):
        return False
    if device.type in ("cpu", "meta"):
        return True
    # Data center GPUs: the clusters of others have no more than 8 blocks.
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


class Pack(NamedTuple):
    """The columns of a block where x (n, c, length) is seen as fewer, longer rows, which begin at
    multiples of 16 bytes: several rows of c channels side by side, or all positions of several
    channels.

    Member m of the block's channel k is its column k * channel_stride + m * member_stride.
    """

    channels: int
    members: int
    channel_stride: int
    member_stride: int


@dataclass(frozen=True)
class BatchNormPlan:
    """Tiles of BLOCK_N * BLOCK_L rows (n, l) and BLOCK_C channels, and who walks over them.

    The rows of a block of channels are n_tiles tiles, which n_programs share. With a pack they are
    the rows of what it makes of x, and BLOCK_C is of columns.
    """

    BLOCK_N: int
    BLOCK_L: int
    BLOCK_C: int
    num_warps: int
    n_tiles: int
    n_programs: int
    tiles_per_program: int
    pack: Pack | None = None

    @property
    def reduction(self) -> str:
        """Over what a program reduces: one "tile" that stays on chip, all tiles of its channels
        ("program"), or its share of them ("partial")."""
        return "tile" if self.n_tiles == 1 else "program" if self.n_programs == 1 else "partial"

    def stages(self, *tensors: torch.Tensor | None) -> int:
        """Of the loop over tiles of `tensors`: 48 KB under way hide the latency of memory, even
        where this is a multiprocessor's only program. That, or one tile (of three float64 tensors
        96 KB), fits the 99 KB that a program has of the smallest shared memory since sm_80."""
        if self.n_tiles == 1:
            return 1
        values = self.BLOCK_N * self.BLOCK_L * self.BLOCK_C
        size = sum(values * t.element_size() for t in tensors if t is not None)
        return min(8, 1 + max(1, 49152 // size))

    def grid(self, n_channels: int) -> tuple[int, int]:
        """Programs over channels and over rows."""
        block = self.BLOCK_C if self.pack is None else self.pack.channels
        return (_ceil_div(n_channels, block), self.n_programs)

    def partials(self, n: int) -> int:
        """How many of n partial results a column merges at the most, as a power of two."""
        return next_power_of_2(_ceil_div(n, 1 if self.pack is None else self.pack.members))


# For an H100, a multiprocessor of which has 65,536 registers and 256 KB of L1; elsewhere they only
# decide which of two right plans is taken.
# Float32 values that 8 warps hold of a tile and still compute with: 32 a thread, twice that in the
# forward pass, which holds one tensor where the backward pass holds two.
_ON_CHIP_VALUES = 8192
# Values of a tile where a program walks over several: 16 a thread of 8 warps.
_TILE_VALUES = 4096
# Bytes that a program reads twice from L1, or at least from L2, its neighbours' beside its own.
_CACHED_BYTES = 131072
# Programs that are enough to read at full speed: about half of the multiprocessors.
_ENOUGH_PROGRAMS = 64
# Bytes of the packed columns of a block: two warps' accesses of 16 bytes.
_PACKED_BYTES = 1024


def batch_norm(
    n: int,
    c: int,
    length: int,
    columns: bool,
    align: int,
    dtype: torch.dtype,
    tensors: int,
    processors: int = 132,
    compact: bool = False,
) -> BatchNormPlan:
    """For x (n, c, length), its channels adjacent in memory (`columns`) or else its positions, runs
    of which begin at multiples of `align` elements, on a device of `processors` multiprocessors.

    `tensors` are held at once to reduce over a channel: 1 forward, 2 backward, 0 where nothing is
    reduced. `compact`: nothing lies between the elements of a tensor, so that it may be packed.
    """
    plan = _batch_norm(n, c, length, columns, align, dtype, tensors, processors)
    cached = n * length * dtype.itemsize <= _CACHED_BYTES
    whole = tensors > 0 and plan.n_programs == 1 and cached
    pack = _pack(n, c, length, columns, dtype.itemsize, whole) if compact else None
    if pack is None:
        return plan
    packed = _packed(n * length, c, pack, dtype.itemsize, tensors, whole, processors)
    return packed or plan


@functools.lru_cache  # not of every batch size that ever was
def _pack(n: int, c: int, length: int, columns: bool, itemsize: int, whole: bool) -> Pack | None:
    """The pack of x (n, c, length), if its rows do not begin at multiples of 16 bytes anyway;
    `whole`, if programs own whole channels."""
    vector, most = 16 // itemsize, _PACKED_BYTES // itemsize
    if columns:
        rows = math.gcd(n, vector // math.gcd(vector, c))
        # What programs found of more channels, or of more columns, would be too much to merge.
        while rows * c > most // 2:
            rows //= 2
        return None if whole or length > 1 or rows <= 1 or c > 64 else Pack(c, rows, 1, c)
    least = vector // math.gcd(vector, length)  # channels
    total = c * length  # columns, of which an int32 holds the number
    if least == 1 or total % vector or total >= 2**31:
        return None
    # As many times the least as leave the fewest of a block's columns unused.
    most = min(most // (least * length), c // least // (_ENOUGH_PROGRAMS if whole else 1))
    times = range(1, most + 1)
    widths = [m * least * length for m in times if m * least * length * itemsize >= 64]
    if not widths:
        return None
    width = max(widths, key=lambda w: (w / next_power_of_2(w), w))
    return Pack(width // length, length, length, 1)


def _packed(
    rows: int, c: int, pack: Pack, itemsize: int, tensors: int, whole: bool, processors: int
) -> BatchNormPlan | None:
    """For `rows` rows of c channels; none where a program should own whole channels and cannot."""
    n, width = rows // pack.members, pack.channels * pack.members
    block_n, block_c = next_power_of_2(n), next_power_of_2(width)
    capacity = _capacity(tensors, itemsize)
    if whole and block_n * block_c <= capacity:
        return BatchNormPlan(block_n, 1, block_c, 8, 1, 1, 1, pack)
    block_n = min(max(1, _TILE_VALUES // block_c), block_n)
    tiles = _ceil_div(n, block_n)
    if whole and n * width * itemsize > _CACHED_BYTES:
        return None
    programs = 1
    if not whole:  # one of 16 warps for each multiprocessor; each column merges its part
        most = 2 * _TILE_VALUES * pack.members // block_c
        programs = min(processors // _ceil_div(c, pack.channels), most)
    return BatchNormPlan(block_n, 1, block_c, 16, *_shared(tiles, programs), pack)


def _capacity(tensors: int, itemsize: int) -> int:
    """Values of one tensor in a tile of so many that stays on chip; half as many of float64."""
    return _ON_CHIP_VALUES * 2 // max(1, tensors) * 4 // max(4, itemsize)


def _shared(tiles: int, programs: int) -> tuple[int, int, int]:
    """(tiles, programs, tiles per program) of at most `programs`, of which each has a tile."""
    tiles_per_program = max(1, _ceil_div(tiles, max(1, min(tiles, programs))))
    return tiles, max(1, _ceil_div(tiles, tiles_per_program)), tiles_per_program


def _batch_norm(
    n: int,
    c: int,
    length: int,
    columns: bool,
    align: int,
    dtype: torch.dtype,
    tensors: int,
    processors: int,
) -> BatchNormPlan:
    """As above, of rows as they are."""
    rows, itemsize = n * length, dtype.itemsize
    # A channel's rows on chip, in one tile: every value is read once.
    capacity = _capacity(tensors, itemsize)
    block_n, block_l = next_power_of_2(n), next_power_of_2(length)
    sector = 32 // itemsize  # elements in 32 bytes, the least that memory is read by
    # So many channels has a program at the least, of images only where they have few positions.
    least = sector if columns else next_power_of_2(_ceil_div(sector, length))
    least = min(least, next_power_of_2(c))
    short = least > 1 and not columns
    if short:  # every element has an address of its own
        capacity //= 2
    if tensors and block_n * block_l * least <= capacity:
        # 16 bytes or more for every thread of 4 warps; and twice the sector, where that leaves a
        # program for every multiprocessor. More than 8 values a thread of 4 warps spilled on sm_100
        # where accesses are narrow.
        block_c, tile = least, block_n * block_l
        while block_c < next_power_of_2(c) and 2 * block_c * tile <= capacity:
            wider = columns and block_c < 2 * sector and c >= 2 * block_c * processors
            if 2 * block_c * tile > 1024 and not wider:
                break
            block_c *= 2
        num_warps = 4 if block_n * block_l * block_c <= 1024 else 8
        many = not columns and c >= 8 * processors
        if many and tensors == 1 and block_n == 32 and block_l in (64, 128):
            # A thread for each position, which has it of all images: one address and one stride,
            # half of the instructions. Of two tensors, or of more images, that spilled; and few
            # programs of so few warps would leave multiprocessors idle.
            num_warps = block_l // 32
        return BatchNormPlan(block_n, block_l, block_c, num_warps, 1, 1, 1)
    # Narrow accesses need an address each, and 16 of those did not fit into sm_100's registers; nor
    # did 16 positions of images, 8 of short ones, beside what is read ahead, on sm_80 and sm_100.
    values = _TILE_VALUES // 4 if short else _TILE_VALUES // 2
    if align * itemsize >= 16 and columns:
        values = _TILE_VALUES
    # One program a block of channels, and one launch.
    whole = (
        tensors > 0
        and rows * itemsize * least <= _CACHED_BYTES
        and _ceil_div(c, least) >= _ENOUGH_PROGRAMS
    )
    if columns:
        # 128 bytes a row or more; of 64 channels half, for the fewer results to merge in a program.
        block_c = least if whole else min(64 if c > 64 else 32, next_power_of_2(c), values)
        block_l = min(values // block_c, block_l)
    else:
        block_c = least
        block_l = min(values // block_c, block_l)
        # Less than an eighth of the positions beyond the end, or runs of 64.
        while block_l > 64 and (-length) % block_l * 8 > length:
            block_l //= 2
    block_n = min(max(1, values // (block_c * block_l)), next_power_of_2(n))
    tiles = _ceil_div(n, block_n) * _ceil_div(length, block_l)
    programs = 1
    if not whole:
        # No more than two programs for each multiprocessor, which most often are resident at once;
        # each of the second launch merges what the first's found, two tiles at most.
        programs = min(2 * processors // _ceil_div(c, block_c), 2 * _TILE_VALUES // block_c)
    return BatchNormPlan(block_n, block_l, block_c, 16 if whole else 8, *_shared(tiles, programs))


def scan(n: int) -> int:
    """Block of a one-program pass over `n` numbers."""
    return min(next_power_of_2(n), 1024)


# What the compiler makes of the alternatives is in docs/performance.md.
MLP_TRAIN_PRECISION = "fp16x3"


@dataclass(frozen=True)
class MLPTrainPlan:
    """A program that trains one model: `groups` x `parts` x `units` hidden units, and the other
    sizes padded to powers of two."""

    groups: int
    parts: int
    units: int
    BLOCK_B: int  # examples of a minibatch
    BLOCK_F: int  # features: the embeddings of a context
    BLOCK_V: int  # characters of the vocabulary
    BLOCK_E: int  # numbers of an embedding
    BLOCK_T: int  # characters of a context
    bits: int  # of a character
    num_warps: int
    lanes: int  # of a warp: 32 on NVIDIA, 64 on AMD

    @property
    def options(self) -> dict[str, int]:
        """The compiler's, of each vendor."""
        if self.lanes == 64:
            # Matrix instructions of 16 x 16 for tiles of 16 x 8, too. Left alone, it multiplies
            # those pair by pair: twice the instructions, and 310 registers of spills.
            return {"matrix_instr_nonkdim": 16}
        # A thread's share of the multiprocessor's 65,536; left alone, the assembler takes fewer as
        # soon as it has to spill.
        return {"maxnreg": min(255, 65536 // (32 * self.num_warps))}

    @property
    def rows(self) -> int:
        """Tiles of the batch in a sum over all units: 16 rows, the tensor cores' height."""
        return min(self.BLOCK_B // 16, self.num_warps)

    def columns(self, n: int) -> int:
        """Tiles of n columns: one for each of the warps that a row of tiles has, 8 columns wide."""
        return min(n // 8, self.num_warps // self.rows)

    @property
    def shared_bytes(self) -> int:
        """At most what the compiler takes of shared memory: for a sum over all units, where the
        tiles of a row share the second factor, a copy of the first for each of them and one half of
        the second (both halves of a single row's, since Triton 3.9); for the table's product its
        matrix of zeros and ones, and demb. On NVIDIA both halves of the first and of demb lie
        there, on AMD one half of one factor at a time."""
        units, rows = self.groups * self.units, self.BLOCK_T * self.BLOCK_B
        onehot, demb = 2 * self.BLOCK_V * rows, 2 * rows * self.BLOCK_E  # of float16
        most = max(onehot, demb) if self.lanes == 64 else onehot + 2 * demb
        for n in (self.BLOCK_V, self.BLOCK_F):
            a, b = 2 * units * self.columns(n) * self.BLOCK_B, 2 * units * n
            halves = 2 if self.rows == 1 else 1
            most = max(most, max(a, b) if self.lanes == 64 else 2 * a + halves * b)
        return most


def mlp_train(
    context: int, embedding: int, hidden: int, vocabulary: int, batch: int, shared_memory: int,
    lanes: int = 32,
) -> MLPTrainPlan:  # fmt: skip
    """One warp a group of hidden units, one more unit than there are: it carries the bias b2.

    Raises ValueError where a program cannot hold the model in `shared_memory` bytes.
    """
    # 32 units a warp make the fewest instructions; 16 where half of them would be padding. Parts of
    # 16, the least that the tensor cores take: what is in flight of 32 would not fit registers.
    parts, units = (2 if hidden >= 128 else 1), 16
    groups = max(4, next_power_of_2((hidden + parts * units) // (parts * units)))
    plan = MLPTrainPlan(
        groups,
        parts,
        units,
        BLOCK_B=max(16, next_power_of_2(batch)),  # 16: the least that tl.dot takes
        BLOCK_F=max(16, next_power_of_2(context * embedding)),
        BLOCK_V=max(16, next_power_of_2(vocabulary)),
        BLOCK_E=max(16, next_power_of_2(embedding)),
        BLOCK_T=next_power_of_2(context),
        bits=max(1, (vocabulary - 1).bit_length()),
        num_warps=min(groups, 16),
        lanes=lanes,
    )
    if plan.shared_bytes > shared_memory:
        raise ValueError(
            f"one multiprocessor cannot hold this network: with {hidden} hidden units, {context} x "
            f"{embedding} features, {vocabulary} characters and minibatches of {batch}, what its "
            f"products share takes {plan.shared_bytes} bytes, and it has {shared_memory}; use "
            "'graph', which takes any size, or smaller sizes"
        )
    if (context + 1) * plan.bits > 63:
        raise ValueError(
            f"{context} characters of context and the next one take {plan.bits} bits each, "
            f"{(context + 1) * plan.bits} together, and a word has 63; use 'graph', which packs "
            "none, or a shorter context"
        )
    return plan


MLP_STEP_CHUNK = 64  # steps in one CUDA graph: 256 launches, some hundred microseconds at the least


@dataclass(frozen=True)
class MLPStepPlan:
    """Tiles of the four kernels of a step, and how many blocks of hidden units there are."""

    hidden_blocks: int
    # Of hidden units, forward and backward:
    BLOCK_B: int  # examples
    BLOCK_H: int  # hidden units
    BLOCK_K: int  # features or classes
    # Of logits and loss:
    LOGITS_B: int  # examples
    BLOCK_V: int  # classes
    LOGITS_K: int  # hidden units
    # Of the table of embeddings:
    BLOCK_P: int  # parts of its gradient, one from each block of hidden units
    BLOCK_R: int  # rows: the characters of all contexts
    BLOCK_E: int  # numbers of an embedding
    TABLE_B: int  # examples, where the gradient of b2 is summed
    num_warps: int
    options: dict[str, int]  # the compiler's, of the backward kernel


def mlp_step(
    models: int, context: int, embedding: int, hidden: int, vocabulary: int, batch: int
) -> MLPStepPlan:
    """Small tiles: a step is short, and many programs finish it sooner than large ones.

    Raises ValueError beyond the offsets within a network, which are int32, or the grid.
    """
    features = context * embedding
    largest = max(vocabulary * embedding, max(features, vocabulary, batch) * hidden,
                  max(features, vocabulary) * batch)  # fmt: skip
    if largest >= 2**31 or models > 65535:
        raise ValueError(
            "a step takes up to 65535 networks, whose tensors have fewer than 2147483648 numbers "
            f"each; got {models} networks with a tensor of {largest}; use fewer or smaller ones"
        )
    options = {}
    if torch.version.hip:  # else some would be of 32 x 32, and the instructions more
        options = {"matrix_instr_nonkdim": 16}
    elif batch > 32:  # it would rather spill some bytes than have one program fewer resident
        options = {"maxnreg": 255}
    blocks = _ceil_div(hidden, 16)
    block_e = min(256, next_power_of_2(embedding))
    # Parts of demb x rows x numbers: 32 loads a thread in flight.
    block_p = min(16, next_power_of_2(blocks))
    return MLPStepPlan(
        blocks,
        BLOCK_B=min(64, max(16, next_power_of_2(batch))),
        BLOCK_H=16,
        BLOCK_K=32,
        LOGITS_B=16,
        BLOCK_V=min(64, max(16, next_power_of_2(vocabulary))),
        LOGITS_K=64,
        BLOCK_P=block_p,
        BLOCK_R=max(1, min(4096 // (block_p * block_e), next_power_of_2(batch * context))),
        BLOCK_E=block_e,
        TABLE_B=128,
        num_warps=4,
        options=options,
    )
