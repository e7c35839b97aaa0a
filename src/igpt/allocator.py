"""What becomes of a tensor's memory on a CPU."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor, where it would give it back and fault it in anew.

    Every large tensor gains from it (docs/LOG.md); elsewhere than on Linux with glibc, nothing is
    done.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(top_pad, 64 << 20)
