"""A process that does not finish its second checkpoint: it hangs while writing, or the disk is full.

Run as ``python checkpoint_worker.py hang|full FOLDER`` beside a folder that may hold older checkpoints.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from video_swinv2.engine import checkpoint
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.errors import UserError


def main(how: str, folder: str) -> None:
    """Save step 2 under the condition named."""
    tensors = {"layer.weight": torch.ones(1000, 100)}
    state = TrainingState(tensors, dict(tensors), dict(tensors), optimizer_step=2)
    checkpoints = Checkpoints(Path(folder))
    if how == "hang":
        # The disk stops answering when the first file is to be synced. patch.object, because it refuses unknown names.
        with patch.object(checkpoint, "sync_to_disk", lambda path: time.sleep(600)):
            checkpoints.save(state, {}, step=2)
            checkpoints.wait()
    else:
        # No file may grow past 100 kB: writing fails as it does on a full disk, with an OSError and not a signal.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoints.save(state, {}, step=2)
        try:
            checkpoints.save(state, {}, step=3)
        except UserError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
