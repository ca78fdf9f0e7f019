"""What the scripts share. They import it before torch and matplotlib, which read these settings."""

import os
import sys
from types import TracebackType

# Figures go to files. A notebook's backend, inherited from Jupyter or Colab, may not be here.
os.environ["MPLBACKEND"] = "agg"
# Threads of torch that wait for each other spin by default: beside a busy process they stall.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _quiet_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print no traceback for Ctrl-C, which may come while torch is still being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_interrupt
