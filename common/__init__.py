"""Code shared by the scripts. Import it before torch and matplotlib, which read these settings."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Figures go to files. The backend that Jupyter or Colab sets may not be installed here.
os.environ["MPLBACKEND"] = "agg"
# By default, torch's threads spin while they wait, which slows them down when other processes are
# busy. If they slept at once, two threads with the cores to themselves would be a fifth to a third
# slower, so those of GNU's OpenMP spin for some 40 µs first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Macs: what torch's older versions can't compute on the GPU (mixup's fractions), the CPU does.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def _quiet_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print no traceback for Ctrl-C, which may come while torch is still being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _repeat_interrupt(unraisable: Any, report: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Repeat a Ctrl-C that came while an object was being deleted: Python would ignore it."""
    # On Windows, os.kill would end the process at once.
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and os.name != "nt":
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        timer.daemon = True
        timer.start()
    else:
        report(unraisable)


sys.excepthook = _quiet_interrupt
sys.unraisablehook = _repeat_interrupt
