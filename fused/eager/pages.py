"""Large pages for large results on the CPU.

Memory that the system has not given out before comes a page at a time, each on the first write to
it: 4 KB take it a microsecond or two, more than is computed on them. Linux has pages of 2 MB for
those who ask, as NumPy does; PyTorch asks with THP_MEM_ALLOC_ENABLE=1 in the environment.
"""

import ctypes
import mmap

from torch import Tensor

_LEAST_BYTES = 2**22  # NumPy's choice: less may have no whole page of 2 MB within
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # None where there is no such thing

if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def large_pages(t: Tensor) -> Tensor:
    """t itself, new and contiguous in some order, for whose memory large pages are asked.

    It is advice: where the system does not follow it, nothing is different.
    """
    # Of another type, as a fake tensor, it may have no memory.
    if _ADVICE is not None and type(t) is Tensor and t.is_cpu and t.nbytes >= _LEAST_BYTES:
        begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(begin, end - begin, _ADVICE)
    return t
