"""What the data loaders of a run take from a machine: shared memory, host memory and open files.

Loader workers hand their batches over in shared memory (/dev/shm on Linux), which is host memory too. While a run
validates, each of its processes has two loaders: the one for training keeps its workers and what they have read ahead.
"""

from __future__ import annotations

import math

from video_swinv2.config import DataConfig
from video_swinv2.data.loading import PREFETCH

LOADERS = 2  # training and validation
# Memory of a worker that it shares with no other process: 0.12 GB measured for clips of 32 frames from videos of
# 426x320, and room for larger videos.
WORKER_BYTES = 200_000_000
# Resident memory at the peak of a process that trains without a GPU, less what the plan counts of the model: 0.88 GB
# measured in plain PyTorch and 0.99 GB with DeepSpeed (swinv2_nano, 8 clips of 8x64x64).
RESIDENT_BYTES = 950_000_000
# The same with a GPU, where the libraries of CUDA need room too.
PROCESS_BYTES = 2_000_000_000
# Open files of a process that trains: libraries, devices, sockets and logs; then connections to each other process.
PROCESS_FILES, PEER_FILES = 256, 32
# Pipes and semaphores of a worker (6 measured), and the tensors of its batches on their way (pixels, labels, masks).
WORKER_FILES = 6 + 3 * PREFETCH


def micro_batch_bytes(data: DataConfig, micro_batch: int) -> int:
    """Bytes of the pixels of a micro-batch, uint8 (B, 3, [T,] H, W); labels and masks are negligible."""
    size = (data.image_size,) * 2 if isinstance(data.image_size, int) else data.image_size
    return micro_batch * 3 * (data.frames or 1) * math.prod(size)


def loader_bytes(data: DataConfig, micro_batch: int) -> int:
    """Shared memory that one loader of one process can fill: what its workers read ahead, and the batch in use.

    Without workers the process reads by itself, and nothing is shared.
    """
    return (data.workers * PREFETCH + 1) * micro_batch_bytes(data, micro_batch) if data.workers else 0


def loaders_bytes(data: DataConfig, micro_batch: int) -> int:
    """Host memory of the loaders of one process: their workers, and the batches in shared memory."""
    return LOADERS * (data.workers * WORKER_BYTES + loader_bytes(data, micro_batch))


def process_bytes(data: DataConfig, micro_batch: int) -> int:
    """Host memory of one process with its loaders, without states of the model that are kept on the host."""
    return PROCESS_BYTES + loaders_bytes(data, micro_batch)


def process_files(data: DataConfig, processes: int) -> int:
    """Files that one of `processes` processes may have open at once."""
    return PROCESS_FILES + processes * PEER_FILES + LOADERS * data.workers * WORKER_FILES
