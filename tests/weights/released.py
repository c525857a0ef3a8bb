"""One random model in the layout of every known kind of checkpoint: the libraries' own models where they exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import video_swinv2 as vs

DEPTHS, HEADS, WIDTH = (2, 2, 2, 2), (1, 2, 4, 8), 32  # swinv2_nano
CLASSES = 6


def randomise(model: nn.Module) -> nn.Module:
    """Away from the start, where every branch of SwinV2 is zero and any wrong weight in it would go unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("logit_scale"):
                p.uniform_(1.0, 3.0, generator=generator)
            else:
                wide = "cpb_mlp" in name or "position_bias_mlp" in name
                p.normal_(std=0.4 if wide else 0.05, generator=generator)
    return model.eval()


def ours(**changes: Any) -> vs.SwinV2:
    settings = {"num_classes": CLASSES, "image_size": 64, "window": 4} | changes
    return randomise(vs.create_model("swinv2_nano", **settings))


def timm_model(window: int = 4, pretrained: tuple[int, ...] = (0, 0, 0, 0)) -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return randomise(
        SwinTransformerV2(
            img_size=64,
            window_size=window,
            embed_dim=WIDTH,
            depths=DEPTHS,
            num_heads=HEADS,
            num_classes=CLASSES,
            pretrained_window_sizes=pretrained,
        )
    )


def hugging_face_config(**changes: Any) -> Any:
    from transformers import Swinv2Config

    settings = {"image_size": 64, "window_size": 4, "embed_dim": WIDTH, "depths": DEPTHS, "num_heads": HEADS}
    return Swinv2Config(**(settings | changes))


def torchvision_model() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=WIDTH,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=[4, 4],
        num_classes=CLASSES,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    return randomise(model)  # also the key's bias, which the library ignores


def microsoft_state(model: vs.SwinV2, window: int) -> dict[str, Tensor]:
    """Microsoft's state dict: our names, and the buffers of a model built with `window` at 64 pixels."""
    from video_swinv2.models.position_bias import log_coordinates, window_offsets

    state = dict(model.state_dict())
    for stage, norm in enumerate(model.cpb_norm):
        own = min(window, 16 // 2**stage)
        table = log_coordinates(window_offsets((own, own)), norm).view(1, 2 * own - 1, 2 * own - 1, 2)
        for block in range(DEPTHS[stage]):
            prefix = f"layers.{stage}.blocks.{block}"
            state[f"{prefix}.attn.relative_coords_table"] = table
            state[f"{prefix}.attn.relative_position_index"] = torch.zeros(own**2, own**2, dtype=torch.int64)
            if block % 2 and 16 // 2**stage > window:
                state[f"{prefix}.attn_mask"] = torch.zeros((16 // 2**stage // own) ** 2, own**2, own**2)
    return state


def as_shards(state: dict[str, Tensor], folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A Hub folder of two shards and their index."""
    from safetensors.torch import save_file

    folder.mkdir()
    names = sorted(state)
    files = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in files.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
