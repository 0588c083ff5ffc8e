"""A rank that crashes natively in its first run, or fails before the other rank crashes."""

import os
import signal
import sys
import time
from pathlib import Path

folder, kind = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
runs = folder.parent / f"runs-{rank}"
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
(folder / f"written-{rank}").touch(exist_ok=False)
if kind == "crashes" and runs.read_text() == "x" and rank:
    os.kill(os.getpid(), signal.SIGSEGV)
if kind == "fails":
    time.sleep(rank)
    assert rank, "an assertion"
    os.kill(os.getpid(), signal.SIGSEGV)
