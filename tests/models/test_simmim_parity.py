"""SimMIM beside Hugging Face's masked SwinV2: the same weights and mask give the same loss and gradients."""

import pytest
import torch
from transformers import Swinv2ForMaskedImageModeling

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.parity import Case, hugging_face_config, hugging_face_names, load
from tests.models.reference import randomise
from video_swinv2.models.simmim import hidden_cells, mask_cells, masked_l1, random_mask


def renamed(tensors):
    """Our tensors, or their gradients, under Hugging Face's names."""
    names = hugging_face_names({name.removeprefix("encoder."): tensor for name, tensor in tensors.items()})
    names["swinv2.embeddings.mask_token"] = names.pop("mask_token")
    return names


@pytest.mark.parametrize("unit", [4, 8, 16, 32])
def test_loss_mask_and_gradients_are_hugging_faces(unit):
    """Not a tensor without a gradient. In fp64: those of queries and keys are sums of terms that cancel.

    In fp32 each side is up to 2e-4 of the largest element away from its own fp64. There they differ by 2e-9, since
    Hugging Face adds 1e-5 to the number of hidden pixels. `test_parity.py` compares predictions in fp32.
    """
    case = Case((64, 64), 4)
    encoder = randomise(vs.create_model("swinv2_nano", num_classes=0, image_size=64, window=4))
    model = vs.SimMIM(encoder, unit)
    torch.nn.init.normal_(encoder.mask_token)
    theirs = Swinv2ForMaskedImageModeling(hugging_face_config(encoder, case))
    load(theirs, renamed(model.state_dict()))
    model.double()
    theirs.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    cells = mask_cells(64, unit, 2)
    masks = torch.stack([random_mask(cells, 0.6, torch.Generator().manual_seed(seed)) for seed in range(2)])
    assert masks.sum() == 2 * hidden_cells(cells, 0.6)

    prediction = model.eval()(x, masks)
    loss = masked_l1(prediction, x, masks, (unit, unit))
    loss.backward()
    patches = masks.repeat_interleave(unit // 4, 1).repeat_interleave(unit // 4, 2).flatten(1)
    answer = theirs.eval()(x, bool_masked_pos=patches)
    answer.loss.backward()

    assert_close(loss, answer.loss, 1e-7)
    assert_close(prediction, answer.reconstruction, 1e-7)
    found = renamed({name: parameter.grad for name, parameter in model.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].abs().max() > 1e-7, f"{name}: nothing to compare"
        assert_close(gradient, expected[name], 1e-7, name=name)
