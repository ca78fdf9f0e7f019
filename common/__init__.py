"""What the scripts share. They import it before torch and matplotlib, which read these settings."""

import ctypes
import os
import sys
from types import TracebackType

# Figures go to files. A notebook's backend, inherited from Jupyter or Colab, may not be here.
os.environ["MPLBACKEND"] = "agg"
# Threads of torch that wait for each other spin by default: beside a busy process they stall.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A training step frees its megabytes and asks for them again. Linux's C library (glibc) would give
# them back to the kernel in between: an epoch takes a quarter less time if it keeps them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers from malloc.h
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30)


def _quiet_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print no traceback for Ctrl-C, which may come while torch is still being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_interrupt
