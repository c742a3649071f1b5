"""Which numbers are the lowest, exactly and without sorting: tensors in, bool masks out. Ties go by tensor, then by place."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 2**20
"""Numbers looked at at once: what is held besides the numbers and the masks is a few times this."""
DIGIT = 16
"""Bits of a number that one pass tells apart."""


def lowest(tensors: Sequence[Tensor], count: int, *, highest: bool = False) -> list[Tensor]:
    """Masks of the `count` lowest (or highest) finite numbers of all tensors together, each in its tensor's shape.

    A radix select: as integers in the order of the floats, the numbers are counted by their first 16 bits, then those that
    share the threshold's first 16 bits by their next 16, until the threshold is known to the last bit.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors]
    if count == 0:
        return masks
    threshold, below = _threshold(tensors, count, wide, highest)
    ties = count - below
    for tensor, mask in zip(tensors, masks, strict=True):
        flat = mask.view(-1)
        for start, keys in _keys(tensor, wide, highest):
            part = flat[start : start + len(keys)]
            torch.lt(keys, threshold, out=part)
            if ties:
                at = (keys == threshold).nonzero()[:ties, 0]
                part[at] = True
                ties -= len(at)
    return masks


def _threshold(tensors: Sequence[Tensor], count: int, wide: bool, highest: bool) -> tuple[int, int]:
    """The key of the count-th number, and how many numbers are below it."""
    bits = 64 if wide else 32
    below, prefix = 0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for tensor in tensors:
            for _, keys in _keys(tensor, wide, highest):
                if not first:
                    keys = keys[keys >> (shift + DIGIT) == prefix]
                digits = (keys >> shift) + 2 ** (DIGIT - 1) if first else keys >> shift & (2**DIGIT - 1)
                counts += torch.bincount(digits, minlength=2**DIGIT)
        sums = below + counts.cumsum(0)
        digit = int(torch.searchsorted(sums, count))
        below = int(sums[digit] - counts[digit])
        prefix = digit - 2 ** (DIGIT - 1) if first else (prefix << DIGIT) + digit
    return prefix, below


def _keys(tensor: Tensor, wide: bool, highest: bool) -> Iterator[tuple[int, Tensor]]:
    """(start, integers in the order of the numbers from there on), piece by piece; the two zeros are one number."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to(torch.float64 if wide else torch.float32) + 0.0  # −0 + 0 = 0
        keys = piece.view(torch.int64 if wide else torch.int32)
        keys = keys ^ (keys >> (63 if wide else 31) & (2**63 - 1 if wide else 2**31 - 1))
        yield start, ~keys if highest else keys


def lowest_in_rows(matrix: Tensor, count: int, *, highest: bool = False) -> Tensor:
    """Mask [rows, columns] of the `count` lowest (or highest) numbers of every row."""
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    if count == 0:
        return mask
    step = max(1, PIECE // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = -matrix[start : start + step] if highest else matrix[start : start + step]
        threshold = rows.kthvalue(count, dim=1, keepdim=True).values
        below, ties = rows < threshold, rows == threshold
        ties &= ties.cumsum(1, dtype=torch.int32) <= count - below.sum(1, keepdim=True)
        mask[start : start + step] = below | ties
    return mask
