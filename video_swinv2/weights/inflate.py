"""Weights of any known checkpoint into a model; image weights become clip weights on the way.

Inflation is exact: a still image repeated in time gives the image model's features. The patch kernel is divided by its
length in time and repeated (a sum over equal frames), and the bias network's first layer gets a zero column for the
offset in time (a bias that ignores it). Everything else has the same shape in both.
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
    """Fill `model` from a checkpoint and say what became of every tensor; the account prints itself.

    path: a file or a Hub folder of any layout that `formats` knows. classes: the model's class names; the head is taken
    over where the file knows its own and has all of these. cpb_norm: the normaliser per stage of a checkpoint that does
    not tell it (`families` says which do); it is never guessed. time_noise: see `time_noise_of`; 0 inflates plainly.
    UserError, and an untouched model, if anything stays unexplained.
    """
    return fill(model, read_checkpoint(path), classes=classes, cpb_norm=cpb_norm, time_noise=time_noise, seed=seed)


def fill(
    model: SwinV2,
    checkpoint: Checkpoint,
    *,
    classes: Sequence[str] | None = None,
    class_map: Sequence[int] | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    time_noise: float = 0.0,
    seed: int = 0,
) -> Account:
    """`load_weights` from a checkpoint that was read already.

    class_map: for each class of the model the row of the file's head that is its own, where names do not tell.
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
            raise account.refuse("time_noise has no kernel to act on", "it is for images into clips, patch 2 or more")
        values[PATCH_KERNEL] = values[PATCH_KERNEL] + time_noise_of(values[PATCH_KERNEL], time_noise, seed)
        account.inflated[PATCH_KERNEL] += f"; plus noise that sums to zero over time ({time_noise:g} deviations)"
    for name in sorted(target.keys() - values.keys()):
        account.initialised[name] = _reason_initialised(name, found, head, account)
    bad = next((name for name, value in values.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise account.refuse(f"{bad} holds NaN or Inf", "take an earlier checkpoint of that run")
    model.load_state_dict(target | values)
    model.cpb_norm = norms
    return account


def time_noise_of(kernel: Tensor, strength: float, seed: int) -> Tensor:
    """Noise for an inflated patch kernel (C, 3, T, H, W) that sums to zero over T, of `strength` times its deviation.

    A still clip keeps its features exactly. But plain inflation gives a model that sees a clip and its reversal as one,
    and where the classes are motions training is slow to leave that symmetry (docs/demo.md has the figures).
    """
    frames = kernel.shape[2]
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed)).to(kernel)
    noise = noise - noise.mean(dim=2, keepdim=True)
    return noise * strength * kernel.std() * (frames / (frames - 1)) ** 0.5


def _normaliser(
    model: SwinV2, checkpoint: Checkpoint, given: Sequence[Sequence[int]] | None, account: Account
) -> list[PerAxis]:
    """The normaliser that comes with the weights; with an image's weights a clip model keeps its own in time."""
    norms, origin = checkpoint.cpb_norm
    if given is not None:
        told = f"; {origin} would say {norms}" if norms is not None and norms != [tuple(n) for n in given] else ""
        norms, origin = [tuple(norm) for norm in given], f"given{told}"
    if norms is None:
        mend = "give it: for weights pre-trained with 192 pixels and window 12 cpb_norm=[[12,12],[12,12],[12,12],[6,6]]"
        mend += " (init_cpb_norm in a configuration, --cpb-norm 12,12,12,6 for convert)"
        raise account.refuse("the log-CPB normaliser is not in the file", mend)
    if len(norms) != len(model.depths):
        raise account.refuse(f"a model of {len(norms)} stages", f"this one has {len(model.depths)}")
    axes = len(model.window)
    if any(len(norm) > axes for norm in norms):
        raise account.refuse("a clip model", "its weights cannot go into an image model")
    if any(len(norm) < 2 or not all(isinstance(n, int) and n > 0 for n in norm) for norm in norms):
        raise account.refuse(f"log-CPB normaliser {norms}", "it is a positive (h, w) or (t, h, w) per stage")
    joined = [(*own[: axes - len(norm)], *norm) for own, norm in zip(model.cpb_norm, norms, strict=True)]
    account.notes.append(f"log-CPB normaliser per stage ({origin}): {joined}")
    return joined


def _head(
    model: SwinV2, checkpoint: Checkpoint, classes: Sequence[str] | None, found: dict[str, Tensor], account: Account
) -> str:
    """Decide on the head and bring its rows into the model's class order; "" if it is taken, else why not."""
    if model.num_classes == 0 or HEAD[0] not in found:
        return "the file has no classification head"
    rows = found[HEAD[0]].shape[0] if found[HEAD[0]].ndim else 0
    names = checkpoint.classes if len(checkpoint.classes) == rows else ()
    if classes is not None and names:
        # A name that stands twice (ImageNet has two cranes) belongs to no row for certain.
        times = Counter(names)
        row_of = {name: row for row, name in enumerate(names) if times[name] == 1}
        absent = [name for name in classes if name not in row_of]
        if absent:
            return f"the file's {rows} classes have no one {absent[0]!r} ({len(absent)} of {len(classes)} not found)"
        order = torch.tensor([row_of[name] for name in classes])
        for key in HEAD:
            if key in found and found[key].shape[0] == rows:
                found[key] = found[key][order]
        account.notes.append(f"head: {len(classes)} of the file's {rows} classes, by name")
    elif rows != model.num_classes:
        return f"the file has {rows} classes, this model {model.num_classes}"
    else:
        account.notes.append("head: class names unknown, their order is taken on trust")
    return ""


def _mapped_head(model: SwinV2, class_map: Sequence[int], found: dict[str, Tensor], account: Account) -> str:
    """The rows of a larger head that are the model's classes; always "", since a map that does not fit is refused."""
    rows = found[HEAD[0]].shape[0] if HEAD[0] in found and found[HEAD[0]].ndim else 0
    if not rows:
        raise account.refuse("the file has no classification head", "leave the class map away")
    outside = [row for row in class_map if not 0 <= row < rows]
    if outside or len(class_map) != model.num_classes:
        fault = f"row {outside[0]}" if outside else f"{len(class_map)} rows for {model.num_classes} classes"
        raise account.refuse(f"the class map has {fault}, the file {rows} rows", "give the map of this head")
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
        return "a backbone for feature maps has no final norm; the model keeps its own"
    raise account.refuse(f"{name} is missing in the file", "the file is damaged or of another architecture")


def _reason_unused(name: str, account: Account) -> str:
    if name == "mask_token" or name.startswith("decoder."):
        return "SimMIM's mask token and decoder serve pre-training only"
    if name in HEAD:
        return "this model has no head"
    raise account.refuse(f"{name} has no place in this model", "it is of another architecture (see model.name)")


def _fit(name: str, tensor: Tensor, target: Tensor, account: Account) -> Tensor:
    """The tensor as it is, or inflated where the model has one more axis."""
    if not tensor.is_floating_point():
        raise account.refuse(f"{name} holds {tensor.dtype}", "weights must be floating-point numbers")
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
        raise account.refuse(shapes, "choose the model size of the file (model.name)")
    account.inflated[name] = reason
    return inflated.to(target.dtype)
