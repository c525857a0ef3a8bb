"""Loads the weights of any known checkpoint into a model, and inflates image weights for clip models.

Letters: C channels, T H W a patch in frames and pixels.

Inflation is exact: for a clip that repeats one image, the clip model gives the features of the image model. Two kinds
of tensor change shape:

    patch kernel             (C, 3, H, W) -> (C, 3, T, H, W)    divided by T and repeated: a mean over equal frames
    first log-CPB layer      (512, 2) -> (512, 3)               a zero column, so that the offset in time has no effect

All other tensors have the same shape in both models. For inputs with another number of channels than three, the patch
kernel of RGB weights is adapted too (`adapt_channels`).
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
    """Load a checkpoint into `model`.

    Args:
        model: an image model or a clip model. Image weights are inflated for a clip model.
        path: a file or Hub folder of any known layout.
        classes: the model's class names. If the file has class names and they include all of these, the rows of its
            head are selected by name; if they do not, the head is not loaded.
        cpb_norm: the log-CPB normaliser of each stage, for a checkpoint that does not contain it; it is never guessed.
        time_noise: strength of the `zero_sum_time_noise` that is added to an inflated patch kernel; 0 for none.
        seed: seed of that noise.

    Returns the account of what happened to every tensor, for printing. Raises UserError, and leaves the model
    unchanged, if a tensor cannot be explained.
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
    """`load_weights` for a checkpoint that has already been read.

    class_map: the row of the file's head for each class of the model, for a file without class names.
    """
    account = Account(str(checkpoint.source.path), checkpoint.layout, notes=list(checkpoint.notes))
    account.provenance = checkpoint.card.provenance if checkpoint.card is not None else {}
    account.derived = {name: "depends on the window; computed, not loaded" for name in checkpoint.derived}
    account.unused = dict(checkpoint.dropped)
    norms = _normaliser(model, checkpoint, cpb_norm, account)
    # `found` is a copy, because the head's rows are selected in it before anything is compared with the model.
    target = model.state_dict()
    found = dict(checkpoint.tensors)
    if class_map is not None:
        head = _mapped_head(model, class_map, found, account)
    else:
        head = _head(model, checkpoint, classes, found, account)

    # First collect all new values and every reason to refuse, and touch the model only at the end.
    values: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name not in target:
            account.unused[name] = _reason_unused(name, model, account)
        elif name in HEAD and head:
            account.unused[name] = head
        else:
            values[name] = _fit(name, tensor, target[name], account)
    if time_noise:
        # Only an inflated kernel of at least 2 frames has an axis over which the noise can sum to zero.
        shapes = found[PATCH_KERNEL].shape, target[PATCH_KERNEL].shape
        if (len(shapes[0]), len(shapes[1])) != (4, 5) or shapes[1][2] == 1:
            raise account.refusal(
                "time_noise needs an inflated patch kernel",
                "use it for image weights in a clip model, patches of 2 frames or more",
            )
        values[PATCH_KERNEL] = values[PATCH_KERNEL] + zero_sum_time_noise(values[PATCH_KERNEL], time_noise, seed)
        account.inflated[PATCH_KERNEL] += f"; plus noise that sums to zero over time ({time_noise:g} deviations)"
    # Tensors of the model that the file does not have: `_reason_initialised` raises for those that it should have.
    own = checkpoint.card.architecture if checkpoint.card is not None else {}
    of_backbone = account.layout == "Hugging Face" or bool(own.get("features_only"))
    for name in sorted(target.keys() - values.keys()):
        account.initialised[name] = _reason_initialised(name, found, head, of_backbone, account)
    # A diverged run may have saved NaN, which would spoil everything that is computed with these weights.
    bad = next((name for name, value in values.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise account.refusal(f"{bad} holds NaN or Inf", "take an earlier checkpoint of that run")
    model.load_state_dict(target | values)
    model.cpb_norm = norms
    return account


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """The patch kernel of RGB weights for inputs of `channels` channels: (C, 3, *patch) -> (C, channels, *patch).

    As timm's `adapt_input_conv`: one channel gets the sum of the three, so that a grey input gives what its three equal
    channels gave. For other numbers, the three are repeated in turn and scaled to keep the sum.
    """
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, [channel % 3 for channel in range(channels)]] * (3 / channels)


def zero_sum_time_noise(kernel: Tensor, strength: float, seed: int) -> Tensor:
    """Noise for an inflated patch kernel (C, 3, T, H, W) that sums to zero over T.

    Its standard deviation is `strength` times that of the kernel. As it sums to zero, a still clip keeps its features
    exactly. Without the noise, an inflated model cannot distinguish a clip from its reversal, and if the classes are
    motions, training is slow to break that symmetry (docs/results/demo.md has the figures). Needs T of at least 2.
    """
    frames = kernel.shape[2]
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed)).to(kernel)
    # Subtracting the mean of T values leaves (T - 1) / T of the variance; the factor in the last line restores it.
    noise = noise - noise.mean(dim=2, keepdim=True)
    return noise * strength * kernel.std() * (frames / (frames - 1)) ** 0.5


def _normaliser(
    model: SwinV2, checkpoint: Checkpoint, given: Sequence[Sequence[int]] | None, account: Account
) -> list[PerAxis]:
    """The log-CPB normaliser of each stage: the given one, or else the one that comes with the weights.

    Image weights have none in time, so a clip model keeps its own there.
    """
    norms, origin = checkpoint.cpb_norm
    if given is not None:
        instead_of = f"; {origin} would say {norms}" if norms is not None and norms != [tuple(n) for n in given] else ""
        norms, origin = [tuple(norm) for norm in given], f"given{instead_of}"
    if norms is None:
        fix = "give it: for weights pre-trained with 192 pixels and window 12 cpb_norm=[[12,12],[12,12],[12,12],[6,6]]"
        fix += " (init_cpb_norm in a configuration, --cpb-norm 12,12,12,6 for convert)"
        raise account.refusal("the log-CPB normaliser is not in the file", fix)
    if len(norms) != len(model.depths):
        raise account.refusal(
            f"its weights have {len(norms)} stages, the model {len(model.depths)}",
            "choose the model size of the file (model.name)",
        )
    axes = len(model.window)
    if any(len(norm) > axes for norm in norms):
        raise account.refusal("weights of a clip model, which an image model cannot take", "set frames")
    if any(len(norm) < 2 or not all(isinstance(n, int) and n > 0 for n in norm) for norm in norms):
        raise account.refusal(f"log-CPB normaliser {norms}", "it is a positive (h, w) or (t, h, w) per stage")
    # Normalisers are (t, h, w) or (h, w), so missing axes are always the first: (8, 7, 7) and (12, 12) -> (8, 12, 12).
    # `own` is the normaliser that the model was built with.
    joined = [(*own[: axes - len(norm)], *norm) for own, norm in zip(model.cpb_norm, norms, strict=True)]
    account.notes.append(f"log-CPB normaliser per stage ({origin}): {joined}")
    return joined


def _head(
    model: SwinV2, checkpoint: Checkpoint, classes: Sequence[str] | None, found: dict[str, Tensor], account: Account
) -> str:
    """Decide whether to load the head, and put its rows in `found` into the order of the model's classes.

    Returns the reason for not loading it, or "" to load it.
    """
    if model.num_classes == 0 or HEAD[0] not in found:
        return "the file has no classification head"
    rows = found[HEAD[0]].shape[0] if found[HEAD[0]].ndim else 0
    # Names are believed only if there is one for each row. With names on both sides, rows are selected by name;
    # otherwise the numbers of classes have to agree, and the order is assumed to.
    names = checkpoint.classes if len(checkpoint.classes) == rows else ()
    if classes is not None and names:
        # A name that occurs twice (ImageNet has two classes "crane") does not identify a row.
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
    elif classes is None and names:
        account.notes.append(f"head: the file's {rows} classes, in its order")
    else:
        account.notes.append("head: class names unknown, so their order could not be checked")
    return ""


def _mapped_head(model: SwinV2, class_map: Sequence[int], found: dict[str, Tensor], account: Account) -> str:
    """Select the rows of a larger head that the class map names.

    Always returns "", like `_head` for a head that is loaded, because a map that does not fit raises UserError.
    """
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


def _reason_initialised(name: str, found: dict[str, Tensor], head: str, of_backbone: bool, account: Account) -> str:
    """Why a tensor of the model is not in the file; UserError if it should be.

    of_backbone: whether the file may be of a model that gives feature maps.
    """
    if name in HEAD and head:
        return head
    if name == "mask_token":
        return "the file was not pre-trained with SimMIM"
    if name in FINAL_NORM and of_backbone and not found.keys() & {*FINAL_NORM, *HEAD}:
        return "a feature backbone has no final norm; the model keeps its own"
    raise account.refusal(f"{name} is missing in the file", "the file is damaged or has another architecture")


def _reason_unused(name: str, model: SwinV2, account: Account) -> str:
    """Why a tensor of the file is not in the model; UserError if it should be."""
    if name == "mask_token" or name.startswith("decoder."):
        return "SimMIM's mask token and decoder serve pre-training only"
    if name in HEAD:
        return "this model has no head"
    if name in FINAL_NORM and model.features_only:
        return "a features_only model has no final norm"
    raise account.refusal(f"{name} has no place in this model", "the file has another architecture (see model.name)")


def _fit(name: str, tensor: Tensor, target: Tensor, account: Account) -> Tensor:
    """The value for a tensor of the model: as in the file, or expanded for a model with an axis of time or other input.

    The latter are the additional axis of a clip model, and another number of channels.
    """
    if not tensor.is_floating_point():
        raise account.refusal(f"{name} holds {tensor.dtype}", "weights must be floating-point numbers")
    if tensor.shape == target.shape:
        account.loaded.append(name)
        return tensor.to(target.dtype)
    reasons = []
    if name == PATCH_KERNEL and tensor.shape[1:2] == (3,) and target.shape[1] != 3:
        tensor = adapt_channels(tensor, target.shape[1])
        reasons.append(f"kernel of 3 channels adapted to {target.shape[1]}")
    if name == PATCH_KERNEL and tensor.ndim == 4 and target.ndim == 5:
        length = target.shape[2]
        # (C, 3, H, W) -> (C, 3, 1, H, W) -> (C, 3, T, H, W)
        inflated = (tensor / length).unsqueeze(2).expand(-1, -1, length, -1, -1)
        reasons.append(f"kernel divided by {length} and repeated over {length} frames")
    elif name.endswith(".cpb_mlp.0.weight") and tensor.shape[1] == 2 and target.shape[1] == 3:
        # Offsets are (t, h, w), so the new column comes first: (512, 2) -> (512, 3).
        inflated = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        reasons.append("zero column for the offset in time")
    else:
        inflated = tensor
    # Anything else that differs means another patch size or another architecture.
    if not reasons or inflated.shape != target.shape:
        shapes = f"{name} is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the model"
        fix = "choose the model size of the file (model.name)"
        if name == PATCH_KERNEL and tensor.shape[:2] == target.shape[:2]:
            # (C, 3, h, w) or (C, 3, t, h, w). Image weights fit patches of any length in time, so the model keeps its.
            patch = [*target.shape[2:-2], *tensor.shape[-2:]] if tensor.ndim == 4 else tensor.shape[2:]
            key, option = f"model.patch_size=[{','.join(map(str, patch))}]", f"--patch-size {','.join(map(str, patch))}"
            fix = f"choose the patch size of the file ({key} in a configuration, {option} for convert)"
        raise account.refusal(shapes, fix)
    account.inflated[name] = "; ".join(reasons)
    return inflated.to(target.dtype)
