"""A process that runs until a signal asks it to stop: says ``ready``, then the signal's name, then ``restored``.

Without one it ends after two minutes, since nobody may be left to end it.
"""

from __future__ import annotations

import signal
import time

from video_swinv2.distributed.signals import StopSignal

before = signal.getsignal(signal.SIGTERM)
with StopSignal() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 120
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    print(stop.name, flush=True)
if signal.getsignal(signal.SIGTERM) == before:
    print("restored", flush=True)
