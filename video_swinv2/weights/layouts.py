"""Recognises the known layouts of SwinV2 checkpoints, and renames their tensors to Microsoft's names.

A layout is recognised by the names and shapes of its tensors, never by the name of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern and its replacement, for `re.sub`. All rules of a layout are applied to each name, one after the other."""

MAX_NAME = 500  # characters
V1_TABLE = "relative_position_bias_table"
FOREIGN = {  # part of a tensor's name -> what the checkpoint is; models that are similar, but not the same function
    ".w_msa.": "an OpenMMLab layout; convert the weights of the original release instead",
    ".meta_mlp.": "timm's swinv2_cr, whose position bias and merging differ from those of the released SwinV2",
}


class UnknownLayoutError(ValueError):
    """The tensors do not belong to a SwinV2 of a known layout. The message says why and, if possible, what to do."""


@dataclass
class NamedTensors:
    """Tensors under Microsoft's names. Those of SimMIM include `mask_token` and `decoder.*`."""

    layout: str
    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    """Parts of the file that have no effect, with the reason."""


# Hugging Face named the norms for their position in SwinV1 blocks, before attention ("before") and before the MLP
# ("after"). In SwinV2 they come after attention and after the MLP. Specific rules precede general ones: the biases of
# query and value come before `.attention.self.`, and `.attention.output.` comes before `.output.`.
HUGGING_FACE: tuple[Rule, ...] = (
    (r"^swinv2\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.query\.bias$", ".attn.q_bias"),
    (r"\.attention\.self\.value\.bias$", ".attn.v_bias"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
# timm puts the patch merging at the start of a stage, Microsoft at the end of the previous one.
TIMM: tuple[Rule, ...] = (
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
    (r"^head\.fc\.", "head."),
)
# features.0 is the patch embedding, after which stages and patch mergings alternate: features.1 is stage 0, features.2
# the merging after it, features.3 is stage 1, and so on. In `mlp`, 1 and 2 are the activation and the dropout.
TORCHVISION: tuple[Rule, ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.(reduction|norm)\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.{m[2]}."),
    (r"^features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
# Applied to every layout. The released SimMIM files call the bias network rpe_mlp (Swin-Transformer issue 271). Huge
# and giant models have an extra norm on the main branch, which is called enorm by Microsoft and norm3 by timm.
ALWAYS: tuple[Rule, ...] = (
    (r"\.rpe_mlp\.", ".cpb_mlp."),
    (r"^(layers\.\d+\.blocks\.\d+\.)norm3\.", r"\1enorm."),
)

DENSE_PREFIX = "backbone.encoder."  # of the encoder in a detector or segmenter of this project


def to_microsoft(tensors: Tensors) -> NamedTensors:
    """Recognise the layout and rename its tensors. Raises UnknownLayoutError for anything but a SwinV2."""
    long = next((name for name in tensors if len(name) > MAX_NAME), None)
    if long is not None:  # Python refuses to convert numbers of thousands of digits
        raise UnknownLayoutError(f"a tensor with a name of {len(long):,} characters")
    _refuse_foreign(tensors)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
        named = NamedTensors("Hugging Face", _fuse_qkv(_rename(tensors, HUGGING_FACE)))
    elif "features.0.0.weight" in tensors:
        named = _split_bias(_rename(tensors, TORCHVISION))
    elif any(name.startswith(DENSE_PREFIX) for name in tensors):
        named = _encoder_alone(tensors)
    elif any(name.startswith("encoder.") for name in tensors):
        named = NamedTensors("SimMIM", _rename(tensors, ((r"^encoder\.", ""),)))
    elif "head.fc.weight" in tensors or _merges_at_the_start(tensors):
        named = NamedTensors("timm", _rename(tensors, TIMM))
    else:
        named = NamedTensors("Microsoft SwinV2", dict(tensors))
    named.tensors = _rename(named.tensors, ALWAYS)
    if "patch_embed.proj.weight" not in named.tensors:
        raise UnknownLayoutError(
            f"not a SwinV2 checkpoint of a known layout (its first key is {next(iter(tensors))!r})"
        )
    if not any(".attn.cpb_mlp." in name for name in named.tensors):
        raise UnknownLayoutError("not a SwinV2: it has no log-CPB network (attn.cpb_mlp); use SwinV2 weights")
    _check_axes(named.tensors)
    return named


def _check_axes(tensors: Tensors) -> None:
    """Raise UnknownLayoutError if one of the tensors whose sizes are looked at has another number of axes."""
    for name, tensor in tensors.items():
        patch, offsets = name == "patch_embed.proj.weight", name.endswith(".cpb_mlp.0.weight")
        if (patch and tensor.ndim not in (4, 5)) or (offsets and tensor.ndim != 2):
            raise UnknownLayoutError(f"{name} is {tuple(tensor.shape)}, which fits no SwinV2; download it again")


def _refuse_foreign(tensors: Tensors) -> None:
    """Raise UnknownLayoutError for models that resemble SwinV2 but compute something else."""
    if any(name.endswith(V1_TABLE) for name in tensors):
        video = any(name.endswith("patch_embed.proj.weight") and t.ndim == 5 for name, t in tensors.items())
        raise UnknownLayoutError(
            f"a {'Video Swin' if video else 'Swin'} V1 checkpoint: with a learned table ({V1_TABLE}), pre-norms and "
            "dot-product attention it computes another function, which cannot be converted; use SwinV2 weights"
        )
    for part, what in FOREIGN.items():
        if any(part in name for name in tensors):
            raise UnknownLayoutError(f"{what} (it has {part.strip('.')})")


def _encoder_alone(tensors: Tensors) -> NamedTensors:
    """The encoder of a detector or segmenter of this project; what is built on it is dropped."""
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(DENSE_PREFIX)}
    others = dict.fromkeys(tensors.keys() - encoder.keys(), "belongs to the heads of a dense task")
    return NamedTensors("dense", {name.removeprefix(DENSE_PREFIX): t for name, t in encoder.items()}, others)


def _merges_at_the_start(tensors: Tensors) -> bool:
    """Whether the first patch merging belongs to stage 1, as in timm, and not to stage 0."""
    merges = [int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.downsample\.", name))]
    return bool(merges) and min(merges) == 1


def _rename(tensors: Tensors, rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        name = old
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise UnknownLayoutError(f"two of its tensors would be called {name!r}, one of them {old!r}; remove one")
        renamed[name] = tensor
    return renamed


def _fuse_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the three matrices (C, C) of each attention to one (3C, C), in the order query, key, value."""
    for query in [name for name in tensors if name.endswith(".attn.query.weight")]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in tensors for part in parts):
            if len({tensors[part].shape for part in parts}) > 1 or tensors[query].ndim != 2:
                raise UnknownLayoutError(
                    f"{query} and those of key and value are not equal matrices; download it again"
                )
            tensors[query.replace(".query.", ".qkv.")] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def _split_bias(tensors: dict[str, Tensor]) -> NamedTensors:
    """Split torchvision's qkv.bias (3C,) into q_bias and v_bias, (C,) each.

    The part of the key is dropped, because torchvision sets it to zero in every forward pass.
    """
    named = NamedTensors("torchvision", tensors)
    for name in [name for name in tensors if name.endswith(".attn.qkv.bias")]:
        bias = tensors.pop(name)
        if bias.ndim != 1 or not len(bias) or len(bias) % 3:
            raise UnknownLayoutError(f"{name} is {tuple(bias.shape)}, not three vectors in one; download it again")
        q_bias, _, v_bias = bias.chunk(3)
        attention = name.removesuffix("qkv.bias")
        tensors |= {f"{attention}q_bias": q_bias, f"{attention}v_bias": v_bias}
        named.dropped[f"{attention}k_bias"] = "torchvision sets the key's bias to zero in every forward pass"
    return named
