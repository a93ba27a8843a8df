"""What this process has freed stays with it, where the devices are CPUs.

Every step on CPU allocates its temporaries anew. glibc gives them back to the system after use, and
gets them again page by page, each filled with zeros: an eighth of a small step.
"""

import contextlib
import ctypes

from jax.sharding import Mesh

# Numbers of parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed(mesh: Mesh) -> None:
    """Has malloc keep all that is freed for later; does nothing on GPUs, or without glibc.

    The process then stays as large as it has been at most.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # Only the first arena can grow without mmap.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
