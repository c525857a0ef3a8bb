"""A GPU for tests on machines that have none: fake tensors on `cuda`, which have shapes and devices but no values.

Inside `fake_gpu`, an operation raises if its operands are on different devices, as on a GPU; only CPU tensors without
axes may join in, as on a GPU. Tensors that are created without a device are on the CPU. What is not covered: values,
kernels, and what depends on either. torch's autograd engine needs a driver, so `backward` stands in for it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node

M = TypeVar("M", bound=nn.Module)
CUDA = torch.device("cuda", 0)


def fake_gpu(waits: list[str] | None = None) -> FakeTensorMode:
    """The context in which all tensors are fake, also real ones. A number that is read from one is 1.0, True or 0.

    waits: collects every operation at which the CPU would wait until the GPU has done all its work.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dispatch = mode.dispatch

    def read_or_dispatch(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits is not None and _waits(func, args, kwargs or {}):
            waits.append(str(func))
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 0
        return dispatch(func, types, args, kwargs)

    # Not a subclass: torch's rules for operators such as flex_attention are registered for exactly this class.
    mode.dispatch = read_or_dispatch  # type: ignore[method-assign]  # on purpose
    return mode


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation reads a number from the GPU, or copies from or to it without `non_blocking`."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return args[0].is_cuda
    if func is aten._to_copy.default:  # also torch.tensor(numbers, device="cuda")
        target = torch.device(kwargs.get("device") or args[0].device)
        return args[0].device.type != target.type and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return args[0].device.type != args[1].device.type and blocking
    # An index on the CPU, such as a list of numbers, is copied.
    return func is aten.index.Tensor and args[0].is_cuda and any(i is not None and not i.is_cuda for i in args[1])


def place(module: M, device: torch.device | str = CUDA) -> M:
    """Replace all parameters of a module, which has no buffers, by fake ones. Call it inside `fake_gpu`."""
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(part, name, nn.Parameter(new, requires_grad=old.requires_grad))
    return module


@torch.no_grad()
def backward(result: Tensor) -> None:
    """`result.backward()` without torch's engine: call the nodes of the graph, each after all that lead to it.

    Asserts that every gradient is on the device of the tensor that it belongs to.
    """
    gradients: dict[Node, dict[int, Tensor]] = {result.grad_fn: {0: torch.ones_like(result)}}
    with pytest.MonkeyPatch.context() as patch:
        # By this number checkpointed blocks know that they have been recomputed in this pass.
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
        for node in reversed(_in_forward_order(result.grad_fn)):
            if given := gradients.pop(node, {}):
                _pass_on(node, given, gradients)


def _pass_on(node: Node, given: dict[int, Tensor], gradients: dict[Node, dict[int, Tensor]]) -> None:
    """Call a node with the gradients `given` of its outputs, and add what it returns to those of the next nodes."""
    # Functions written in Python, such as our sequential attention, have `apply`; torch's own nodes are callable.
    found = getattr(node, "apply", node)(*(given.get(i) for i in range(len(node._input_metadata))))
    for (into, place), gradient in zip(node.next_functions, _as_tuple(found), strict=False):
        if into is not None and gradient is not None:
            wanted = into._input_metadata[place]
            assert gradient.device == wanted.device, f"{node.name()} -> {into.name()}: {gradient.device}"
            gradient = gradient.sum_to_size(wanted.shape)  # the engine too sums over broadcast axes
            before = gradients.setdefault(into, {})
            before[place] = before[place] + gradient if place in before else gradient


def _as_tuple(found: Tensor | tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
    return found if isinstance(found, tuple) else (found,)


def _in_forward_order(last: Node | None) -> list[Node]:
    """All nodes from which `last` can be reached backwards, each after the nodes that it leads to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(last, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((into, False) for into, _ in node.next_functions if into is not None)
    return order
