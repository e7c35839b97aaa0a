"""Memory allocation of tensors on a CPU."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system.

    This avoids page faults for every large tensor (docs/LOG.md has the times). Without glibc, it
    does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(top_pad, 64 << 20)
