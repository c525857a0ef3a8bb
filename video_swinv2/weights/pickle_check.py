"""Checks the instructions of a pickle before it is read: what it can allocate and compute is bounded by its size.

Nothing that a pickle names is ever called here (see `unpickle`), but a few bytes of plain instructions are enough to
exhaust memory or time. "Remember the top of the stack as number 2^31" allocates a table of that length, a string may
declare any length, and a tuple that holds another one twice, sixty times over, takes 2^60 steps as the key of a dict.
"""

from __future__ import annotations

import os
import pickletools
from typing import IO

MAX_BYTES = 64 * 2**20
"""Of a pickle. Tensors are not in it: to describe 40,000 of them takes about 6 MB."""
MAX_INSTRUCTIONS = 2**20
"""About 25 describe a tensor, so this is enough for 40,000. Each may create an object of some 250 bytes."""
MAX_KEY_WEIGHT = 64
"""Values within a dict's key or a member of a set, counted as often as they are reached."""

UNDERFLOW = "a pickle that takes more from its stack than there is"
_MARK = object()
# Instructions whose operands become keys or members, with every how many of those above the mark (or the first operand)
# are hashed.
_KEYS = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2, "ADDITEMS": 1, "FROZENSET": 1}


def check_pickle(stream: IO[bytes]) -> None:
    """Check the pickle that begins at the position of `stream`, which does not change. Raises ValueError for a bomb.

    A string must end within the pickle, a number under which a value is remembered may not be larger than the number
    of instructions before, and a key may not contain more than MAX_KEY_WEIGHT values.
    """
    start, end = stream.tell(), stream.seek(0, os.SEEK_END)
    stream.seek(start)
    if end - start > MAX_BYTES:
        raise ValueError(f"a pickle of {end - start:,} bytes")
    # What the instructions do is followed with the weight of each value in place of the value: 1, and the weights of
    # all that it is made of. A list that grows later keeps its weight, but nothing that holds a list can be a key.
    stack: list[object] = []
    memo: dict[int, object] = {}
    # `genops` also checks that every operand lies within the stream.
    for number, (opcode, operand, _) in enumerate(pickletools.genops(stream)):
        if number >= MAX_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {MAX_INSTRUCTIONS:,} instructions")
        name, index = opcode.name, operand if isinstance(operand, int) else 0
        if "PUT" in name or name == "MEMOIZE":
            if not 0 <= index <= number:
                raise ValueError(f"value {index:,} of a pickle after {number:,} instructions")
            if not stack or stack[-1] is _MARK:
                raise ValueError(UNDERFLOW)
            memo[len(memo) if name == "MEMOIZE" else index] = stack[-1]
        elif "GET" in name:
            stack.append(memo.get(index, 1))
        else:
            taken = _take(stack, opcode)
            _check_keys(name, taken)
            weight = min(2**62, 1 + index.bit_length() // 64 + sum(item for item in taken if isinstance(item, int)))
            stack += [_MARK if kind is pickletools.markobject else weight for kind in opcode.stack_after]
    stream.seek(start)


def _take(stack: list[object], opcode: pickletools.OpcodeInfo) -> list[object]:
    """Remove the operands of an instruction from the stack: values, or values below a mark, the mark and all above."""
    kinds = opcode.stack_before
    below, first = len(kinds), len(stack)
    if pickletools.markobject in kinds:
        below = kinds.index(pickletools.markobject)
        first = next((place for place in range(first - 1, -1, -1) if stack[place] is _MARK), -1)
    if first < below:
        raise ValueError(UNDERFLOW)
    taken = stack[first - below :]
    del stack[first - below :]
    return taken


def _check_keys(name: str, taken: list[object]) -> None:
    """Raise ValueError if an instruction makes a key of a value that is too heavy."""
    every = _KEYS.get(name)
    if every is None:
        return
    # SETITEM takes dict, key, value; the others take the dict or set (DICT and FROZENSET do not), a mark and the rest.
    operands = taken[taken.index(_MARK) + 1 :] if _MARK in taken else taken[1:]
    if any(isinstance(key, int) and key > MAX_KEY_WEIGHT for key in operands[::every]):
        raise ValueError(f"a key that contains more than {MAX_KEY_WEIGHT} values")
