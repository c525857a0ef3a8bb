"""Loads the weights of any known checkpoint into a model; image weights are inflated to clip weights.

Inflation is exact: a still image repeated in time gives the image model's features. Two kinds of tensor change shape:

    patch kernel             (C, 3, H, W) -> (C, 3, T, H, W)    divided by T and repeated: a mean over equal frames
    first log-CPB layer      (512, 2) -> (512, 3)               a zero column for the offset in time, which is ignored

Everything else has the same shape in both models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import PerAxis
from video_swinv2.weights.account import Account
from video_swinv2.weights.formats import Checkpoint, read_checkpoint

HEAD = ("head.weight", "head.bias")
FINAL_NORM = ("norm.weight", "norm.bias")
PATCH_KERNEL = "patch_embed.proj.weight"


def load_weights(
    model: SwinV2,
    path: Path | str,
    *,
    classes: Sequence[str] | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    time_noise: float = 0.0,
    seed: int = 0,
) -> Account:
    """Load a checkpoint into `model`; returns the account of what happened to every tensor, for printing.

    Args:
        model: an image model, or a clip model, for which image weights are inflated.
        path: a file or Hub folder of any known layout.
        classes: the model's class names. The head is loaded, row by row, if the file names its own classes and has
            all of these.
        cpb_norm: the log-CPB normaliser per stage, for a checkpoint that does not contain it; it is never guessed.
        time_noise: strength of `zero_sum_time_noise` on an inflated patch kernel; 0 for none.
        seed: of that noise.

    UserError, and an unchanged model, if anything cannot be explained.
    """
    return fill_model(
        model, read_checkpoint(path), classes=classes, cpb_norm=cpb_norm, time_noise=time_noise, seed=seed
    )


def fill_model(
    model: SwinV2,
    checkpoint: Checkpoint,
    *,
    classes: Sequence[str] | None = None,
    class_map: Sequence[int] | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    time_noise: float = 0.0,
    seed: int = 0,
) -> Account:
    """`load_weights` from a checkpoint that has been read already.

    class_map: for each class of the model, the number of its row in the file's head, if names do not say.
    """
    account = Account(str(checkpoint.source.path), checkpoint.layout, notes=list(checkpoint.notes))
    account.provenance = checkpoint.card.provenance if checkpoint.card is not None else {}
    account.derived = {name: "depends on the window; computed, not loaded" for name in checkpoint.derived}
    account.unused = dict(checkpoint.dropped)
    norms = _normaliser(model, checkpoint, cpb_norm, account)
    target = model.state_dict()
    found = dict(checkpoint.tensors)
    if class_map is not None:
        head = _mapped_head(model, class_map, found, account)
    else:
        head = _head(model, checkpoint, classes, found, account)

    values: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name not in target:
            account.unused[name] = _reason_unused(name, account)
        elif name in HEAD and head:
            account.unused[name] = head
        else:
            values[name] = _fit(name, tensor, target[name], account)
    if time_noise:
        if PATCH_KERNEL not in account.inflated or target[PATCH_KERNEL].shape[2] == 1:
            raise account.refusal(
                "time_noise needs an inflated patch kernel",
                "use it for image weights in a clip model, patches of 2 frames or more",
            )
        values[PATCH_KERNEL] = values[PATCH_KERNEL] + zero_sum_time_noise(values[PATCH_KERNEL], time_noise, seed)
        account.inflated[PATCH_KERNEL] += f"; plus noise that sums to zero over time ({time_noise:g} deviations)"
    for name in sorted(target.keys() - values.keys()):
        account.initialised[name] = _reason_initialised(name, found, head, account)
    bad = next((name for name, value in values.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise account.refusal(f"{bad} holds NaN or Inf", "take an earlier checkpoint of that run")
    model.load_state_dict(target | values)
    model.cpb_norm = norms
    return account


def zero_sum_time_noise(kernel: Tensor, strength: float, seed: int) -> Tensor:
    """Noise for an inflated patch kernel (C, 3, T, H, W) that sums to zero over T, of `strength` times its deviation.

    A still clip keeps its features exactly. Without the noise, an inflated model cannot tell a clip from its reversal,
    and if the classes are motions, training leaves that symmetry slowly (docs/results/demo.md has the figures).
    """
    frames = kernel.shape[2]
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed)).to(kernel)
    noise = noise - noise.mean(dim=2, keepdim=True)
    return noise * strength * kernel.std() * (frames / (frames - 1)) ** 0.5


def _normaliser(
    model: SwinV2, checkpoint: Checkpoint, given: Sequence[Sequence[int]] | None, account: Account
) -> list[PerAxis]:
    """The normaliser that comes with the weights; for image weights, a clip model keeps its own in time."""
    norms, origin = checkpoint.cpb_norm
    if given is not None:
        instead_of = f"; {origin} would say {norms}" if norms is not None and norms != [tuple(n) for n in given] else ""
        norms, origin = [tuple(norm) for norm in given], f"given{instead_of}"
    if norms is None:
        fix = "give it: for weights pre-trained with 192 pixels and window 12 cpb_norm=[[12,12],[12,12],[12,12],[6,6]]"
        fix += " (init_cpb_norm in a configuration, --cpb-norm 12,12,12,6 for convert)"
        raise account.refusal("the log-CPB normaliser is not in the file", fix)
    if len(norms) != len(model.depths):
        raise account.refusal(f"a model of {len(norms)} stages", f"this one has {len(model.depths)}")
    axes = len(model.window)
    if any(len(norm) > axes for norm in norms):
        raise account.refusal("a clip model", "its weights cannot go into an image model")
    if any(len(norm) < 2 or not all(isinstance(n, int) and n > 0 for n in norm) for norm in norms):
        raise account.refusal(f"log-CPB normaliser {norms}", "it is a positive (h, w) or (t, h, w) per stage")
    joined = [(*own[: axes - len(norm)], *norm) for own, norm in zip(model.cpb_norm, norms, strict=True)]
    account.notes.append(f"log-CPB normaliser per stage ({origin}): {joined}")
    return joined


def _head(
    model: SwinV2, checkpoint: Checkpoint, classes: Sequence[str] | None, found: dict[str, Tensor], account: Account
) -> str:
    """Decide whether the head is loaded, and sort its rows into the model's class order; "" if so, else why not."""
    if model.num_classes == 0 or HEAD[0] not in found:
        return "the file has no classification head"
    rows = found[HEAD[0]].shape[0] if found[HEAD[0]].ndim else 0
    names = checkpoint.classes if len(checkpoint.classes) == rows else ()
    if classes is not None and names:
        # A name that occurs twice (ImageNet has two cranes) identifies no row.
        times = Counter(names)
        row_of = {name: row for row, name in enumerate(names) if times[name] == 1}
        absent = [name for name in classes if name not in row_of]
        if absent:
            return f"the file's {rows} classes do not include {absent[0]!r} ({len(absent)} of {len(classes)} not found)"
        order = torch.tensor([row_of[name] for name in classes])
        for key in HEAD:
            if key in found and found[key].shape[0] == rows:
                found[key] = found[key][order]
        account.notes.append(f"head: {len(classes)} of the file's {rows} classes, by name")
    elif rows != model.num_classes:
        return f"the file has {rows} classes, this model {model.num_classes}"
    else:
        account.notes.append("head: class names unknown, so their order could not be checked")
    return ""


def _mapped_head(model: SwinV2, class_map: Sequence[int], found: dict[str, Tensor], account: Account) -> str:
    """Keep the rows of a larger head that the class map names; always returns "", because a bad map is refused."""
    rows = found[HEAD[0]].shape[0] if HEAD[0] in found and found[HEAD[0]].ndim else 0
    if not rows:
        raise account.refusal("the file has no classification head", "omit the class map")
    outside = [row for row in class_map if not 0 <= row < rows]
    if outside or len(class_map) != model.num_classes:
        fault = f"row {outside[0]}" if outside else f"{len(class_map)} rows for {model.num_classes} classes"
        raise account.refusal(f"the class map has {fault}, the file {rows} rows", "give the map of this head")
    for key in HEAD:
        if key in found:
            found[key] = found[key][torch.tensor(class_map)]
    account.notes.append(f"head: {len(class_map)} of the file's {rows} classes, by the class map")
    return ""


def _reason_initialised(name: str, found: dict[str, Tensor], head: str, account: Account) -> str:
    if name in HEAD and head:
        return head
    if name == "mask_token":
        return "the file was not pre-trained with SimMIM"
    if name in FINAL_NORM and account.layout == "Hugging Face" and not found.keys() & {*FINAL_NORM, *HEAD}:
        return "a feature backbone has no final norm; the model keeps its own"
    raise account.refusal(f"{name} is missing in the file", "the file is damaged or has another architecture")


def _reason_unused(name: str, account: Account) -> str:
    if name == "mask_token" or name.startswith("decoder."):
        return "SimMIM's mask token and decoder serve pre-training only"
    if name in HEAD:
        return "this model has no head"
    raise account.refusal(f"{name} has no place in this model", "the file has another architecture (see model.name)")


def _fit(name: str, tensor: Tensor, target: Tensor, account: Account) -> Tensor:
    """The tensor unchanged, or inflated if the model has one more axis."""
    if not tensor.is_floating_point():
        raise account.refusal(f"{name} holds {tensor.dtype}", "weights must be floating-point numbers")
    if tensor.shape == target.shape:
        account.loaded.append(name)
        return tensor.to(target.dtype)
    if name == PATCH_KERNEL and tensor.ndim == 4 and target.ndim == 5:
        length = target.shape[2]
        inflated = (tensor / length).unsqueeze(2).expand(-1, -1, length, -1, -1)
        reason = f"kernel divided by {length} and repeated over {length} frames"
    elif name.endswith(".cpb_mlp.0.weight") and tensor.shape[1] == 2 and target.shape[1] == 3:
        inflated = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        reason = "zero column for the offset in time"
    else:
        inflated, reason = tensor, ""
    if not reason or inflated.shape != target.shape:
        shapes = f"{name} is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the model"
        raise account.refusal(shapes, "choose the model size of the file (model.name)")
    account.inflated[name] = reason
    return inflated.to(target.dtype)
