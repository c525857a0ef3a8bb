"""A process that runs until a signal asks it to stop: says ``ready``, then the signal's name, then ``restored``."""

from __future__ import annotations

import signal
import time

from video_swinv2.training.runtime import StopSignal

before = signal.getsignal(signal.SIGTERM)
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.name, flush=True)
if signal.getsignal(signal.SIGTERM) == before:
    print("restored", flush=True)
