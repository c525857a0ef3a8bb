"""Loaders under faults (killed workers, decoders that hang or crash), repeats, and memory over 10,000 clips.

Faults are tested with plain and with pinned memory. Pinning needs an accelerator, but what it changes about the death
of a worker does not: a thread of PyTorch's then fetches the batches. The fixture `pin` runs that thread without one.
"""

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import termios
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import pin_memory
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.waiting import wait_until
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data import datasets, decoders, loading
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.loading import StepSampler, plan_batch, training_loader, validation_loader
from video_swinv2.data.manifest import read_manifest
from video_swinv2.data.sources import unlabelled_mixture
from video_swinv2.data.workers import WORKER_DEATH_MESSAGE, is_worker_death, start_loader
from video_swinv2.errors import UsageError, UserError

CLIPS = 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_video):
    """Small videos of noise, so that no two samples are equal."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for i in range(CLIPS):
        write_video(folder / f"{i}.mp4", rng.integers(0, 255, (6, 32, 40, 3), dtype=np.uint8))
    lines = "".join(f"{i}.mp4 {i % 2}\n" for i in range(CLIPS))
    for name, text in (("train.txt", lines), ("val.txt", lines), ("classes.txt", "even\nodd\n")):
        (folder / name).write_text(text)
    return folder


def samples(folder, workers, repeats=1, augmented=True, **changes):
    values = {"source": str(folder), "image_size": 32, "frames": 2, "workers": workers} | changes
    augment = AugmentConfig(repeats=repeats) if augmented else None
    return SampleDataset(read_manifest(folder, "train").entries, DataConfig(**values), augment, 0, None)


def read(dataset, steps=4, batch=4, micro=2, repeats=1, pin=False):
    plan = plan_batch(batch, micro, 1, repeats)
    return training_loader(dataset, plan, seed=0, rank=0, first=0, last=steps, pin=pin)


@pytest.fixture(autouse=True)
def _deaths_show_soon(monkeypatch):
    """PyTorch looks for dead workers every five seconds; here it looks more often."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.fixture(params=[False, True], ids=["plain", "pinned"])
def pin(request, monkeypatch):
    """Whether memory is pinned. If so, PyTorch believes in an accelerator, whose page-locked copies are the tensors."""
    if request.param:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return request.param


def working_threads():
    """All threads but those that write to queues.

    A worker that is killed while it sends keeps the lock of its queue for ever. If memory is pinned, PyTorch then tells
    its other thread through the same queue to end, and the one that writes waits for the lock as long as the process
    lives. It is a daemon, does nothing and holds nothing but the message.
    """
    return [thread for thread in threading.enumerate() if thread.name != "QueueFeederThread"]


@pytest.fixture(autouse=True)
def _nothing_is_left_over():
    """After each test there are no more processes than before, and no more threads."""
    before = len(working_threads())
    yield
    assert multiprocessing.active_children() == []
    wait_until(lambda: len(working_threads()) <= before)


def disturb(monkeypatch, name, act):
    """Whoever opens the video `name` calls `act` first; workers inherit this by fork."""
    reader = decoders.VideoReader

    def opened(path: Path, **limits: float):
        if path.name == name:
            act()
        return reader(path, **limits)

    monkeypatch.setattr(decoders, "VideoReader", opened)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    """Hang in C with the interpreter's lock held, as a deadlocked decoder does."""
    ctypes.PyDLL(None).pause()


def assert_nothing_changed(expected, found):
    """Every batch arrived once, in order, with the same pixels and no file named."""
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert (a.numbers, b.broken) == (b.numbers, ())


@pytest.mark.parametrize("act", [die, crash])
def test_a_killed_worker_is_replaced_and_nothing_changes(clips, tmp_path, monkeypatch, pin, act):
    expected = list(read(samples(clips, 0)))
    once = tmp_path / "died"

    def die_once():
        if not once.exists():
            once.touch()
            act()

    disturb(monkeypatch, "3.mp4", die_once)
    loader = read(samples(clips, 2), pin=pin)
    assert_nothing_changed(expected, list(loader))
    assert loader.restarts == 1


def test_a_worker_killed_between_two_files_is_replaced_and_nothing_changes(clips, monkeypatch, pin):
    expected = list(read(samples(clips, 0), steps=12))
    loader = read(samples(clips, 2), steps=12, pin=pin)
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == 3:
            # By now, both workers wait for this process, which takes no further batch until they have nothing to do.
            wait_until(lambda: all(row[1] == -1 for row in loader.dataset.in_hand._rows.tolist()))
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert_nothing_changed(expected, found)
    assert loader.restarts == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("pin", [True], indirect=True)
@pytest.mark.parametrize("act", [die, crash])
def test_a_batch_whose_worker_dies_before_it_is_pinned_is_read_again(clips, tmp_path, monkeypatch, pin, act):
    """The thread that pins memory then fails to fetch the batch and ends, and does not say why."""
    expected = list(read(samples(clips, 0)))
    arrived, died, opened, errors = tmp_path / "arrived", tmp_path / "died", [], []
    reader, loop = decoders.VideoReader, pin_memory._pin_memory_loop
    start, judge = loading.start_loader, loading.is_worker_death

    def open_two_files_and_die(path, **limits):
        opened.append(path)
        if len(opened) == 3 and not died.exists():  # the first batch, of two files, is on its way
            wait_until(arrived.exists)
            died.write_text(str(os.getpid()))
            act()
        return reader(path, **limits)

    def begin_after_the_death(queue, *others):
        if not died.exists():
            wait_until(queue._reader.poll)
            arrived.touch()
            wait_until(lambda: died.exists() and is_dead(died.read_text()))
        loop(queue, *others)

    def start_and_be_busy(*addresses, **settings):
        batches = start(*addresses, **settings)
        if not died.exists():
            batches._pin_memory_thread.join()  # the next batch is not asked for before
        return batches

    monkeypatch.setattr(decoders, "VideoReader", open_two_files_and_die)
    monkeypatch.setattr(loading, "start_loader", start_and_be_busy)
    monkeypatch.setattr(pin_memory, "_pin_memory_loop", begin_after_the_death)
    monkeypatch.setattr(
        loading, "is_worker_death", lambda error, files: errors.append(str(error)) or judge(error, files)
    )
    loader = read(samples(clips, 1), pin=pin)
    assert_nothing_changed(expected, list(loader))
    assert loader.restarts == 1
    assert errors == ["Pin memory thread exited unexpectedly"]


class Announcements(Dataset):
    """Samples that are announced in 12,000 bytes each."""

    def __getitem__(self, number):
        return bytes(12_000)


@contextmanager
def interruption(seconds):
    """Raise TimeoutError in this thread, even if it waits in a system call, after `seconds`."""

    def interrupt(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def until_death(batches):
    try:
        yield from batches
    except RuntimeError as error:
        if not is_worker_death(error, None):
            raise


def test_a_worker_that_dies_while_its_announcements_wait_leaves_no_half_message():
    batches = start_loader(Announcements(), [[0]] * 20, list, workers=1, prefetch=16)
    pipe = batches._worker_result_queue._reader
    # More than five: an ordinary pipe of 64 KiB has no room for all of the sixth, and the worker waits in the middle.
    wait_until(lambda: int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder) > 61_000)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with interruption(60.0):  # without one, it would wait for the other half for ever
        found = list(until_death(batches))
    assert len(found) >= 6
    assert {len(batch[0]) for batch in found} == {12_000}


def is_dead(pid):
    """Whether a process has ended, even if nobody has asked for its exit code yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def load_and_hang(pids):
    """Send the pid of a loader's worker, which hangs with the first sample as a decoder may."""

    class Hanging(Dataset):
        def __getitem__(self, number):
            pids.send(os.getpid())
            signal.pause()

    next(start_loader(Hanging(), [[0]], list, workers=1, prefetch=1))


def test_a_hung_worker_ends_with_its_process():
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.get_context("fork").Process(target=load_and_hang, args=(theirs,))
    owner.start()
    worker = ours.recv()
    owner.kill()
    owner.join()
    with interruption(60.0):
        wait_until(lambda: is_dead(worker))


@pytest.mark.parametrize(("act", "restarts", "words"), [(hang, 1, "did not answer within 5.3 s"), (die, 2, "crashed")])
def test_a_clip_that_its_decoder_does_not_survive_is_replaced_and_named(clips, monkeypatch, pin, act, restarts, words):
    undisturbed = list(read(samples(clips, 0)))
    disturb(monkeypatch, "5.mp4", act)
    loader = read(samples(clips, 2, decode_seconds=0.1 if act is hang else 60.0), pin=pin)
    found = list(loader)
    assert 1 <= loader.restarts <= restarts, "two workers may die of it at once"
    lines = {line for batch in found for line in batch.broken}
    assert [("5.mp4" in line, words in line) for line in lines] == [(True, True)]
    for a, b in zip(undisturbed, found, strict=True):
        assert a.numbers == b.numbers
        for number, x, y in zip(a.numbers, a.pixels, b.pixels, strict=True):
            assert torch.equal(x, y) == (number != 5)  # read from the next video


def test_a_hung_decoder_in_validation_costs_one_answer(clips, monkeypatch, pin):
    disturb(monkeypatch, "5.mp4", hang)
    dataset = samples(clips, 1, augmented=False, decode_seconds=0.1)
    labels = torch.cat([batch.labels for batch in validation_loader(dataset, 2, rank=0, world=1, pin=pin)])
    assert labels.tolist() == [0, 1, 0, 1, 0, datasets.UNREADABLE_LABEL, 0, 1]


def test_workers_that_die_one_after_the_other_end_the_run(clips, monkeypatch, pin):
    reader = decoders.VideoReader
    monkeypatch.setattr(decoders, "VideoReader", lambda path, **limits: die() or reader(path, **limits))
    with pytest.raises(UserError, match=r"5 loader workers died .* lower data\.workers \(1\) or optim\.micro_batch"):
        list(read(samples(clips, 1), pin=pin))


def test_repeats_are_decoded_once_and_augmented_differently(clips, monkeypatch):
    opened = []
    disturbed = decoders.VideoReader
    monkeypatch.setattr(
        decoders, "VideoReader", lambda path, **limits: opened.append(path) or disturbed(path, **limits)
    )
    dataset = samples(clips, 0, repeats=2)
    assert len(dataset) == 2 * CLIPS
    batches = list(read(dataset, steps=2, batch=8, micro=5, repeats=2))
    assert len(opened) == len(set(opened)) == CLIPS
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4]
    for batch in batches:
        assert [number // 2 for number in batch.numbers[:2]] == [number // 2 for number in batch.numbers[2:]]
        assert batch.numbers[0] // 2 != batch.numbers[1] // 2  # mixing pairs neighbours, which are different clips
        assert not torch.equal(batch.pixels[0], batch.pixels[2])
    alone = samples(clips, 0, repeats=2)
    assert torch.equal(alone[(0, batches[1].numbers[3])].pixels, batches[1].pixels[3])
    # The same clip of the video, unlike the frames_per_video of pre-training: without augmentation nothing differs.
    dataset.transform = lambda clip: clip
    assert torch.equal(dataset[(1, 6)].pixels, dataset[(1, 7)].pixels)


def test_repeats_of_pretraining_are_repeats_of_each_clip(clips):
    data = DataConfig(source=str(clips), image_size=32, frames=2, frames_per_video=2, workers=0)
    dataset = SampleDataset(unlabelled_mixture(data, False, 3), data, AugmentConfig(repeats=3), 0, None)
    assert len(dataset) == 6 * CLIPS
    dataset.transform = lambda clip: clip
    found = [dataset[(0, number)].pixels for number in range(6)]
    same = [torch.equal(found[0], other) for other in found]
    assert same == [True, True, True, False, False, False]
    assert len(unlabelled_mixture(data, True, 3)) == CLIPS


def test_repeats_of_a_clip_share_a_micro_batch_on_any_number_of_processes():
    for world in (1, 2, 3):
        plan = plan_batch(18, 7, world, 3)
        assert plan.micro == {1: 6, 2: 3, 3: 6}[world]
        for rank in range(world):
            sampler = StepSampler(24, lambda epoch: np.arange(24), plan, rank=rank, first=0, last=4)
            for piece in sampler:
                assert [number % 3 for _, number in piece] == [0, 1, 2] * (plan.micro // 3)
    with pytest.raises(UsageError, match="shared by 2 processes in 3 repeats of a clip; use a multiple of 6"):
        plan_batch(8, 4, 2, 3)
    with pytest.raises(UsageError, match=r"cannot hold the 3 of augment\.repeats; use at least 3"):
        plan_batch(6, 2, 1, 3)


def resident(pid):
    """Resident bytes of a process that it does not share."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2])
def test_memory_is_flat_over_ten_thousand_clips(clips, repeats):
    """This process and its workers hold as much after 10,000 clips, decoded and augmented, as after 2,000."""
    dataset = samples(clips, 2, repeats=repeats)
    seen, sizes = 0, {}
    for batch in read(dataset, steps=10_000 * repeats // 16, batch=16, micro=16, repeats=repeats):
        seen += len(batch.labels) // repeats
        if seen in (2_000, 10_000):
            sizes[seen] = [resident(pid) for pid in (os.getpid(), *children(os.getpid()))]
    assert len(sizes[2_000]) >= 3
    print({clips: [round(size / 2**20, 1) for size in found] for clips, found in sizes.items()})
    for before, after in zip(sizes[2_000], sizes[10_000], strict=True):
        assert after - before < 8 * 2**20, "bytes leaked over 8,000 clips"


def send_what_cannot_be_sent(numbers: list[int]) -> object:
    """A batch that fails to be pickled, as one does for which there is no memory left in /dev/shm."""
    return (lambda: numbers) if 1 in numbers else numbers


def test_a_worker_that_cannot_send_a_batch_dies_instead_of_losing_it():
    batches = start_loader(Counting(), [[0], [1]], send_what_cannot_be_sent, workers=1, prefetch=2)
    assert next(batches) == [0]
    # A lost batch would be waited for without end.
    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("the batch was lost"))
    signal.alarm(120)
    try:
        with pytest.raises(RuntimeError, match=WORKER_DEATH_MESSAGE):
            next(batches)
    finally:
        signal.alarm(0)


class Counting(Dataset):
    def __getitem__(self, number: int) -> int:
        return number
