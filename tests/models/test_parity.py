"""The image model beside independent ones: timm, Hugging Face, torchvision; SimMIM beside Hugging Face."""

import pytest
import timm
import torch
from transformers import Swinv2ForMaskedImageModeling

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.parity import (
    KINDS,
    PAIRS,
    Case,
    differences,
    hugging_face_config,
    hugging_face_names,
    load,
    ours,
    pairs_of_outputs,
    timm_names,
)
from tests.models.reference import randomise
from video_swinv2.models.simmim import masked_l1
from video_swinv2.models.swinv2 import SwinV2

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def agree(model: SwinV2, case: Case, library: str, tolerance: float = 2.5e-6) -> None:
    """Logits and every stage's features, whose largest values are 3 to 4 deviations: 1e-5 of a deviation or less."""
    for i, (mine, theirs) in enumerate(pairs_of_outputs(model, case, library)):
        assert_close(mine, theirs, tolerance, name=f"stage {i}" if i else "logits")


@pytest.mark.parametrize(("case", "library"), PAIRS, ids=lambda value: str(value))
def test_equal_to_other_libraries(case, library):
    """Logits and every stage's features; `make proof` does the same with the tiny size."""
    agree(ours("swinv2_nano", case), case, library)


@pytest.mark.parametrize("backend", KINDS)
def test_every_backend_equals_timm(backend):
    case = Case((64, 128), 4, (12, 12, 12, 6))
    agree(ours("swinv2_nano", case, backend), case, "timm")


def test_only_rounding_is_left():
    """In fp64 nothing remains where 8 / (window - 1) is exact in the fp32 coordinates, so no term differs."""
    case = Case((128, 192), 2)
    for library in ("timm", "Hugging Face", "torchvision"):
        agree(ours("swinv2_nano", case).double(), case, library, 1e-12)


def test_a_wrong_normaliser_is_seen():
    """The comparison has teeth: another normaliser is a small change that it must find."""
    case = Case((64, 64), 4)
    model = ours("swinv2_nano", case)
    model.cpb_norm = [(5, 5)] * 4
    assert max(differences(model, case, "timm")) > 1e-2


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_names_and_shapes_are_microsofts(size):
    """timm keeps Microsoft's names but for merging and head, so its shapes stand for Microsoft's here."""
    with torch.device("meta"):
        model = vs.create_model(f"swinv2_{size}", num_classes=1000, image_size=192, window=12)
        variant = {"tiny": "tiny_window8_256", "small": "small_window8_256"}.get(size, f"{size}_window12_192")
        theirs = timm.create_model(f"swinv2_{variant}", num_classes=1000).state_dict()
    renamed = timm_names(model.state_dict())
    assert {k: tuple(v.shape) for k, v in renamed.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize(("size", "window"), [(64, 4), (128, 8)])
def test_simmim_is_hugging_faces(size, window):
    """The same prediction and loss under the same mask; Hugging Face does not normalise the target."""
    encoder = randomise(vs.create_model("swinv2_nano", num_classes=0, image_size=size, window=window))
    model = vs.SimMIM(encoder, 8).eval()
    torch.nn.init.normal_(encoder.mask_token)
    torch.nn.init.normal_(model.decoder[0].weight, std=0.1)
    theirs = Swinv2ForMaskedImageModeling(hugging_face_config(encoder, Case((size, size), window))).eval()
    state = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    renamed = hugging_face_names(state)
    renamed["swinv2.embeddings.mask_token"] = renamed.pop("mask_token")
    load(theirs, renamed)
    x = torch.randn(2, 3, size, size)
    mask = torch.rand(2, size // 8, size // 8) < 0.6
    patches = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    with torch.no_grad():
        expected, got = theirs(x, bool_masked_pos=patches), model(x, mask)
    assert expected.reconstruction.std() > 0.5
    assert_close(got, expected.reconstruction)
    torch.testing.assert_close(masked_l1(got, x, mask, (8, 8)), expected.loss, rtol=1e-6, atol=0)
