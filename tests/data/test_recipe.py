"""The ImageNet recipe against timm's: RandAugment operation by operation, random erasing, soft targets."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import mixup_target

from video_swinv2.config import AugmentConfig
from video_swinv2.data import transforms
from video_swinv2.data.transforms import GREY, OPERATIONS, Erasing, RandAugment, denormalise, mix, normalise
from video_swinv2.errors import UsageError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

# Our name, timm's, the sign with which both do the same (both draw it), and the mean difference allowed, in steps of
# 255: geometric operations are interpolated by different code, at the border with the fill colour.
SAME = [
    ("autocontrast", "AutoContrast", 1, 0.6),
    ("equalize", "Equalize", 1, 0.0),
    ("invert", "Invert", 1, 0.0),
    ("rotate", "Rotate", 1, 2.0),
    ("posterize", "PosterizeIncreasing", 1, 0.0),
    ("solarize", "SolarizeIncreasing", 1, 0.0),
    ("solarize_add", "SolarizeAdd", 1, 0.0),
    ("color", "ColorIncreasing", 1, 0.6),
    ("contrast", "ContrastIncreasing", 1, 1.0),
    ("brightness", "BrightnessIncreasing", 1, 0.6),
    ("sharpness", "SharpnessIncreasing", 1, 0.3),
    ("shear_x", "ShearX", 1, 2.0),
    ("shear_y", "ShearY", 1, 2.0),
    ("translate_x", "TranslateXRel", -1, 2.0),
    ("translate_y", "TranslateYRel", -1, 2.0),
]


@pytest.fixture(scope="module")
def photograph():
    """(3, 96, 128) uint8: coloured, with an edge, and with grain for sharpness to act on."""
    rows, columns = np.mgrid[:96, :128]
    channels = [40 + rows, 200 - columns, 128 + 60 * np.sin(rows / 9) * np.cos(columns / 13)]
    pixels = np.stack(channels, axis=-1) + np.random.default_rng(0).normal(0, 8, (96, 128, 1))
    pixels[30:50, 40:90] = (250, 20, 90)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def test_the_operations_are_timms():
    assert [theirs for _, theirs, _, _ in SAME] == auto_augment._RAND_INCREASING_TRANSFORMS
    assert [ours for ours, *_ in SAME] == list(OPERATIONS)


@pytest.mark.parametrize("magnitude", [2.0, 9.0])
@pytest.mark.parametrize(("ours", "theirs", "agree", "allowed"), SAME, ids=[row[0] for row in SAME])
def test_each_operation_does_what_timms_does(photograph, monkeypatch, ours, theirs, agree, allowed, magnitude):
    settings = {"img_mean": GREY, "interpolation": Image.Resampling.BILINEAR}
    operation = auto_augment.AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=settings)
    image = Image.fromarray(photograph.permute(1, 2, 0).numpy())
    for sign in (1, -1):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        expected = torch.from_numpy(np.array(operation(image))).permute(2, 0, 1)
        found = OPERATIONS[ours](photograph[None], magnitude / 10, sign * agree)[0]
        assert found.dtype == torch.uint8
        assert (found.int() - expected.int()).abs().float().mean() <= allowed
        assert (found.int() - photograph.int()).abs().float().mean() > 2 * allowed, "it changes something"


def test_draws_follow_the_recipe(photograph, monkeypatch):
    """Operations are equally frequent, half are applied, magnitudes normal around 9, clipped at 10, signs even."""
    seen = []

    def note(name):
        return lambda clip, level, sign: seen.append((name, level, sign)) or clip

    monkeypatch.setattr(transforms, "OPERATIONS", {name: note(name) for name in OPERATIONS})
    augment = RandAugment(2, 9.0, 0.5)
    torch.manual_seed(0)
    for _ in range(4000):
        augment(photograph[None])
    assert abs(len(seen) - 4000) < 5 * 45  # 8000 draws, each with probability 0.5
    counts = Counter(name for name, _, _ in seen)
    assert len(counts) == 15
    assert all(abs(count - len(seen) / 15) < 5 * 16 for count in counts.values())
    levels = torch.tensor([level for _, level, _ in seen])
    assert levels.max() == 1.0
    assert abs(levels.median() - 0.9) < 0.005
    assert abs((levels < 0.85).float().mean() - 0.159) < 0.03  # one standard deviation below the mean
    assert abs(sum(sign for _, _, sign in seen)) < 5 * 64
    assert augment(photograph[None]) is not None


def test_no_noise_is_one_magnitude(photograph, monkeypatch):
    seen = []
    monkeypatch.setattr(transforms, "OPERATIONS", {"a": lambda clip, level, sign: seen.append(level) or clip})
    for _ in range(20):
        RandAugment(2, 7.0, 0.0)(photograph[None])
    assert seen == pytest.approx([0.7] * len(seen))
    assert 10 < len(seen) < 30


def test_erasing_is_noise_of_the_normalised_input(photograph):
    """Erases a quarter of the samples, 2 % to a third of the area; normalised, the noise is standard normal."""
    clip = photograph.expand(2, -1, -1, -1).contiguous()
    torch.manual_seed(0)
    erase = Erasing(0.25)
    areas, noise = [], []
    for _ in range(400):
        out = erase(clip)
        assert torch.equal(out[0], out[1])
        changed = (out[0] != clip[0]).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            areas.append(changed[box].numel() / changed.numel())
            noise.append(normalise(out[:1], IMAGENET_MEAN, IMAGENET_STD)[0, :, box[0], box[1]].flatten())
    assert abs(len(areas) - 100) < 5 * 8.7
    assert min(areas) > 0.01
    assert max(areas) < 0.35
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.03
    assert 0.93 < values.std() < 1.02  # a little under 1: bytes end at 2 to 2.6 standard deviations


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_and_smoothed_targets_give_timms_loss(smoothing):
    """timm smooths, mixes, then takes soft cross-entropy; here the loss smooths the mixed targets."""
    logits, labels, classes = torch.randn(4, 7), torch.tensor([1, 3, 3, 6]), 7
    share = 0.3
    soft = F.one_hot(labels, classes).float()
    ours = F.cross_entropy(logits, share * soft + (1 - share) * soft.flip(0), label_smoothing=smoothing)
    target = mixup_target(labels, classes, share, smoothing)
    theirs = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
    torch.testing.assert_close(ours, theirs)


def test_mixup_and_cutmix_take_turns():
    """Each gets half of the batches; constant images show which one it was."""
    inputs = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    kinds = Counter()
    for seed in range(300):
        torch.manual_seed(seed)
        mixed, _ = mix(inputs.clone(), torch.arange(4), 4, AugmentConfig(mixup=0.8, cutmix=1.0))
        kinds["whole" if torch.equal(mixed, mixed.round()) else "blended"] += 1
    assert abs(kinds["whole"] - 150) < 5 * 8.7


def test_one_sample_cannot_be_mixed():
    with pytest.raises(UsageError, match="micro-batch of 1"):
        mix(torch.zeros(1, 3, 4, 4), torch.tensor([0]), 2, AugmentConfig(mixup=0.8))


def test_denormalise_is_the_inverse():
    pixels = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    again = denormalise(normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(again, pixels)
