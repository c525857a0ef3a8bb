"""UPerNet: equal to transformers' with the same weights, any image size, losses worked out by hand, model files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.swinv2 import Swinv2Config
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

import video_swinv2 as vs
from video_swinv2.dense.segmenters import create_segmenter, pixel_loss
from video_swinv2.dense.upernet import AuxiliaryHead, UPerHead
from video_swinv2.errors import UserError

CHANNELS = [32, 64, 128, 256]
# Our names, as regular expressions, and those of transformers.
NAMES = (
    (r"^pooling\.pools\.(\d)\.1\.", r"psp_modules.\1.1."),
    (r"^pooling\.fuse\.", "bottleneck."),
    (r"^laterals\.", "lateral_convs."),
    (r"^smoothings\.", "fpn_convs."),
    (r"^fuse\.", "fpn_bottleneck."),
    (r"^convolution\.", "convs.0."),
    (r"^(.*)\b0\.(weight)$", r"\1conv.\2"),
    (r"^(.*)\b1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"\1batch_norm.\2"),
)


def transformers_name(name: str) -> str:
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def maps(height: int, width: int) -> list[Tensor]:
    """Feature maps of an image of this many patches, which need not be even."""
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(4)]
    return [torch.randn(2, channels, *size) for channels, size in zip(CHANNELS, sizes, strict=True)]


def config() -> UperNetConfig:
    return UperNetConfig(
        backbone_config=Swinv2Config(), hidden_size=64, num_labels=5, auxiliary_channels=32, auxiliary_in_channels=128
    )


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (27, 37)])
def test_the_heads_are_those_of_transformers(size: tuple[int, int], auxiliary: bool) -> None:
    ours: nn.Module
    if auxiliary:
        ours, theirs = AuxiliaryHead(CHANNELS, 32, 5, norm="batch"), UperNetFCNHead(config(), CHANNELS)
    else:
        ours, theirs = UPerHead(CHANNELS, 64, 5, norm="batch"), UperNetHead(config(), CHANNELS)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    theirs.load_state_dict({transformers_name(name): tensor for name, tensor in ours.state_dict().items()})
    inputs = maps(*size)
    with torch.no_grad():
        found, expected = ours.eval()(inputs), theirs.eval()(inputs)
    assert expected.std() > 0.01  # not all the same
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def nano(**options: object) -> vs.Segmenter:
    return create_segmenter("swinv2_nano", num_classes=3, image_size=64, window=4, channels=64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (7, 5)])
def test_logits_have_the_size_of_any_image(size: tuple[int, int]) -> None:
    model = nano().eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert found.shape == (2, 3, *size)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)


def test_losses_are_sums_over_the_pixels_of_a_class_divided_by_all_pixels() -> None:
    model = nano().eval()
    images, masks = torch.randn(2, 3, 16, 24), torch.randint(0, 3, (2, 16, 24))
    masks[0, :12] = 255
    with torch.no_grad():
        losses = model(images, masks)
    assert losses.keys() == {"loss", "auxiliary_loss"}
    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    wanted = 0.0
    for b, h, w in (masks != 255).nonzero().tolist():
        wanted -= float(probabilities[b, masks[b, h, w], h, w].log())
    assert float(losses["loss"]) == pytest.approx(wanted / (2 * 16 * 24), rel=1e-5)
    # So the mean over two batches is that of one.
    with torch.no_grad():
        parts = [float(model(images[i : i + 1], masks[i : i + 1])["loss"]) for i in range(2)]
    assert sum(parts) / 2 == pytest.approx(float(losses["loss"]), rel=1e-5)
    assert float(pixel_loss(torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 255))) == 0


def test_weights_of_classes_multiply_the_loss_of_their_pixels() -> None:
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    masks[0, 0] = 255
    weights = torch.tensor([0.5, 2.0, 7.0])
    each = -logits.log_softmax(dim=1)
    expected = sum(float(weights[k] * each[:, k][masks == k].sum()) for k in range(3)) / 40
    assert float(pixel_loss(logits, masks, weights)) == pytest.approx(expected, rel=1e-5)


def test_every_parameter_learns_and_none_depends_on_the_other_images() -> None:
    model = nano()
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    sum(model(images, masks).values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not list(model.buffers())
    with torch.no_grad():
        assert nano(auxiliary=False)(images, masks).keys() == {"loss"}
        alone = torch.cat([model(image[None]) for image in images])  # in training mode
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-6)


def test_a_model_file_gives_the_segmenter_back(tmp_path: Path) -> None:
    model = nano().eval()
    model.classes = ("road", "sky", "tree")
    vs.save_model(model, tmp_path / "model.safetensors")
    card = vs.read_card(tmp_path)
    assert (card.classes, card.dense["task"]) == (("road", "sky", "tree"), "segmentation")
    found = vs.load_model(tmp_path / "model.safetensors")
    assert isinstance(found, vs.Segmenter)
    assert (found.design, found.classes, found.training) == (model.design, model.classes, False)
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))
        wider = vs.load_model(tmp_path, window=8)
        assert wider(images).shape == (1, 3, 40, 40)
    assert wider.encoder.cpb_norm == model.encoder.cpb_norm
    # The encoder starts other models.
    vs.load_weights(vs.create_segmenter("swinv2_nano", num_classes=7, channels=64).encoder, tmp_path)


def test_what_no_segmenter_can_be_is_refused(tmp_path: Path) -> None:
    for values, message in (
        ({"num_classes": 0}, "num_classes: invalid value 0"),
        ({"num_classes": 256}, "num_classes: invalid value 256"),
        ({"num_classes": 2, "channels": 100}, "channels: 100 is not a positive multiple of 64"),
        ({"num_classes": 2, "dropout": 1}, "dropout: invalid value 1"),
        ({"num_classes": 2, "norm": "layer"}, "norm: 'layer' is not one of group, batch"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            create_segmenter("swinv2_nano", **values)  # type: ignore[arg-type]
    model = nano()
    with pytest.raises(ValueError, match="classes: 1 names for 3 classes"):
        model.classes = ("a",)
    with pytest.raises(UserError, match="2 class names for a head of 3"):
        vs.save_model(model, tmp_path / "a.safetensors", classes=["a", "b"])
