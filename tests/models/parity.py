"""The image model beside timm, Hugging Face and torchvision: our weights under their names, outputs compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torchvision.models import swin_transformer as vision
from transformers import Swinv2Config, Swinv2ForImageClassification

import video_swinv2 as vs
from tests.models.reference import randomise
from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import SwinV2

KINDS: tuple[Backend, ...] = tuple(kind for kind in get_args(Backend) if kind != "auto")
CLASSES = 7
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An image size (H, W), a window, and the log-CPB normalisers where they are not the windows themselves."""

    size: tuple[int, int]
    window: int
    norm: tuple[int, ...] | None = None

    def __str__(self) -> str:
        normalisers = f", normalisers {','.join(map(str, self.norm))}" if self.norm else ""
        return f"{self.size[0]}x{self.size[1]}, window {self.window}{normalisers}"


@dataclass(frozen=True)
class Library:
    """How one library builds the model of a case, what it calls our tensors, and where its stages come out."""

    build: Callable[[SwinV2, Case], nn.Module]
    rename: Callable[[Weights], Weights]
    stages: Callable[[Any], list[nn.Module]]


def ours(name: str, case: Case, attention: Backend = "eager") -> SwinV2:
    """Our model of the case with random weights; the same weights for every backend."""
    norm = [(n, n) for n in case.norm] if case.norm else None
    return randomise(
        vs.create_model(
            name,
            num_classes=CLASSES,
            image_size=case.size,
            window=case.window,
            cpb_norm=norm,
            attention=attention,
        )
    )


def differences(model: SwinV2, case: Case, library: str) -> list[float]:
    """Largest differences for two images: of the logits, then of every stage's features before merging.

    Logits as they are (they spread by about 3). Features in units of their standard deviation: the stages end on the
    residual stream, whose size grows with the number of blocks. In the precision of `model`.
    """
    (logits, answer), *stages = pairs_of_outputs(model, case, library)
    features = [_largest(mine, theirs) / theirs.std().item() for mine, theirs in stages]
    return [_largest(logits, answer), *features]


def pairs_of_outputs(model: SwinV2, case: Case, library: str) -> list[tuple[Tensor, Tensor]]:
    """For two images, ours and the library's: the logits, then every stage's features before merging."""
    other = LIBRARIES[library]
    dtype = next(model.parameters()).dtype
    theirs = other.build(model, case).eval().to(dtype)
    load(theirs, other.rename(model.state_dict()))
    outputs: list[Tensor] = []
    for stage in other.stages(theirs):
        stage.register_forward_hook(lambda _, __, out: outputs.append(out[1] if isinstance(out, tuple) else out))
    x = torch.randn(2, 3, *case.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        answer = theirs(x)
        pairs = [(model(x), getattr(answer, "logits", answer))]
        for mine, tokens in zip(model.forward_pyramid(x), outputs, strict=True):
            mine = mine.movedim(1, -1)
            pairs.append((mine, tokens.reshape(mine.shape)))
    if any(theirs.std() < 0.5 for _, theirs in pairs):
        raise AssertionError("outputs without spread prove nothing")
    return pairs


def _largest(mine: Tensor, theirs: Tensor) -> float:
    return (mine - theirs).abs().max().item()


def load(theirs: nn.Module, weights: Weights) -> None:
    """Every tensor of ours must find a place, and every parameter of theirs must be filled."""
    result = theirs.load_state_dict(weights, strict=False)
    left = [name for name in result.missing_keys if "relative_" not in name]  # tables derived from the window
    if left or result.unexpected_keys:
        raise AssertionError(f"not filled: {left}; without a place: {result.unexpected_keys}")


def _timm(model: SwinV2, case: Case) -> nn.Module:
    return SwinTransformerV2(
        img_size=case.size,
        window_size=case.window,
        pretrained_window_sizes=case.norm or (0, 0, 0, 0),
        embed_dim=model.embed_dim,
        depths=model.depths,
        num_heads=model.num_heads,
        num_classes=CLASSES,
    )


def timm_names(state: Weights) -> Weights:
    """Merging opens the next stage there, and the head sits one level deeper."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.replace("head.", "head.fc.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        renamed[".".join(parts)] = tensor
    return renamed


def hugging_face_config(model: SwinV2, case: Case) -> Swinv2Config:
    """The configuration of Hugging Face's SwinV2 for a case."""
    return Swinv2Config(
        image_size=case.size if case.size[0] != case.size[1] else case.size[0],
        window_size=case.window,
        pretrained_window_sizes=case.norm or (0, 0, 0, 0),
        embed_dim=model.embed_dim,
        depths=model.depths,
        num_heads=model.num_heads,
        num_labels=CLASSES,
    )


HUGGING_FACE = (  # in this order: the first that fits a part of the name wins over later ones on the same part
    ("patch_embed.proj.", "swinv2.embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "swinv2.embeddings.norm."),
    ("layers.", "swinv2.encoder.layers."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.cpb_mlp.", ".attention.self.continuous_position_bias_mlp."),
    (".attn.q_bias", ".attention.self.query.bias"),
    (".attn.v_bias", ".attention.self.value.bias"),
    (".attn.", ".attention.self."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    ("head.", "classifier."),
)


def hugging_face_names(state: Weights) -> Weights:
    """Other words for the same things, and query, key and value apart."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("norm."):
            name = f"swinv2.layer{name}"
        for part, other in HUGGING_FACE:
            name = name.replace(part, other)
        if name.endswith(".qkv.weight"):
            for role, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", role)] = chunk
        else:
            renamed[name] = tensor
    return renamed


def _torchvision(model: SwinV2, case: Case) -> nn.Module:
    if case.norm:
        raise ValueError("torchvision has no normaliser of its own")
    return vision.SwinTransformer(
        patch_size=[4, 4],
        window_size=[case.window, case.window],
        embed_dim=model.embed_dim,
        depths=list(model.depths),
        num_heads=list(model.num_heads),
        num_classes=CLASSES,
        block=vision.SwinTransformerBlockV2,
        downsample_layer=vision.PatchMergingV2,
    )


def torchvision_names(state: Weights) -> Weights:
    """Stages and mergings in one numbered list, and one bias for query, key (always zero) and value."""
    renamed = {}
    for ours_name, tensor in state.items():
        parts = ours_name.split(".")
        if parts[0] == "layers":
            position = 2 * int(parts[1]) + 1 + (parts[2] == "downsample")
            parts = ["features", str(position), *parts[3:]]
        name = ".".join(parts).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        name = name.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        if name.endswith("q_bias"):
            v_bias = state[ours_name.replace("q_bias", "v_bias")]
            renamed[name.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), v_bias))
        elif not name.endswith("v_bias"):
            renamed[name] = tensor
    return renamed


LIBRARIES = {
    "timm": Library(_timm, timm_names, lambda model: list(model.layers)),
    "Hugging Face": Library(
        lambda model, case: Swinv2ForImageClassification(hugging_face_config(model, case)),
        hugging_face_names,
        lambda model: list(model.swinv2.encoder.layers),
    ),
    "torchvision": Library(_torchvision, torchvision_names, lambda model: list(model.features[1::2])),
}

# Where each library is faithful: Hugging Face decides on shrinking and shifting by the height alone, so its non-square
# image has stages that all are larger than the window in both axes; torchvision never shrinks and has no normaliser, so
# its windows must fit the last stage; timm does what we do, axis by axis.
CASES = (
    (Case((256, 256), 8), ("timm", "Hugging Face", "torchvision")),
    (Case((192, 192), 12), ("timm", "Hugging Face")),
    (Case((256, 256), 16, (12, 12, 12, 6)), ("timm", "Hugging Face")),
    (Case((256, 384), 4), ("timm", "Hugging Face", "torchvision")),
    (Case((128, 256), 8), ("timm",)),
)
PAIRS = [(case, library) for case, libraries in CASES for library in libraries]
