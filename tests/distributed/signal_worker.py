"""A process that runs until a signal stops it: prints ``ready``, then the signal's name, then ``restored``.

Without a signal it ends after two minutes, because its parent may be gone.
"""

from __future__ import annotations

import signal
import time

from video_swinv2.distributed.signals import StopSignal

before = signal.getsignal(signal.SIGTERM)
with StopSignal() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 600
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    print(stop.name, flush=True)
if signal.getsignal(signal.SIGTERM) == before:
    print("restored", flush=True)
