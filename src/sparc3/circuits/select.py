"""Contrast and selection: from scores to a circuit. Needs no model; the scientific heart of the method."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import NonFinite, UserError, unknown
from ..scores import Scores
from .circuit import Circuit

SCOPES = ("global", "site", "row")
ORDERS = ("lowest", "highest")


def contrast(
    general: Scores,
    undesired: Scores,
    *,
    matched: Scores | None = None,
    penalty: float = 1.0,
    normalize: str | None = None,
) -> Scores:
    """What a unit gives in general, less what it gives to the undesired behaviour; the lowest are to be removed.

    Plain (Eq. 7): R_general − R_undesired. Matched (docs/method.md, 7): penalty · max(|R_general|, |R_matched|) − R_undesired,
    of which only units below zero are candidates.

    Args:
        matched: scores on benign completions of the same kind of prompts.
        penalty: how much a unit's use elsewhere counts against removing it; only with `matched`.
        normalize: "l1" scales each set of scores to a total absolute value of one first.

    Returns:
        Scores of the same sites and shapes.

    Raises:
        UserError: scores of different models, units, sites or shapes (the message names them), or of unlike settings.
    """
    if normalize not in (None, "l1"):
        raise unknown("normalize", normalize, ("l1",))
    if matched is None and penalty != 1.0:
        raise UserError(
            f"penalty {penalty} without matched scores has no effect; give the matched scores, or leave it out"
        )
    if not (math.isfinite(penalty) and penalty >= 0):
        raise UserError(f"penalty is {penalty}; give a number that is not negative, such as 2")
    parts = {
        "general": general,
        "undesired": undesired,
        **({"matched": matched} if matched is not None else {}),
    }
    for name, scores in parts.items():
        _require_fit(undesired, scores, name)
    ready = {name: _scale_to_unit(scores, normalize) for name, scores in parts.items()}
    values = {}
    for site in general:
        if matched is None:
            values[site] = ready["general"][site] - ready["undesired"][site]
        else:
            values[site] = (
                penalty * torch.maximum(ready["general"][site].abs(), ready["matched"][site].abs())
                - ready["undesired"][site]
            )
    provenance = {
        **{
            key: undesired.provenance.get(key)
            for key in ("method", "unit", "target", "neuron", "reduce", "model")
        },
        "contrast": "plain" if matched is None else "matched",
        "penalty": penalty,
        "normalize": normalize,
        "sources": {name: scores.fingerprint for name, scores in parts.items()},
        "version": __version__,
    }
    return Scores(values, provenance)


def _require_fit(undesired: Scores, other: Scores, name: str) -> None:
    """Raise UserError unless the two sets of scores are about the same units of the same model, found in the same way."""
    mine, theirs = undesired.provenance, other.provenance
    one, two = mine.get("model") or {}, theirs.get("model") or {}
    if one.get("fingerprint") != two.get("fingerprint"):
        raise UserError(
            f"the {name} scores are of model {two.get('id')} ({two.get('fingerprint')}), the undesired ones of "
            f"{one.get('id')} ({one.get('fingerprint')}); attribute both on the same model"
        )
    for key in ("unit", "method", "neuron"):
        if mine.get(key) != theirs.get(key):
            raise UserError(
                f"the {name} scores have {key} '{theirs.get(key)}', the undesired ones '{mine.get(key)}'; attribute both the same way"
            )
    if set(undesired) != set(other):
        odd = sorted(set(undesired) ^ set(other))[0]
        raise UserError(
            f"the {name} and undesired scores are of different sites ({odd} is in one only); attribute both at the same sites"
        )
    for site in undesired:
        if undesired[site].shape != other[site].shape:
            raise UserError(
                f"{site} has shape {tuple(other[site].shape)} in the {name} scores and {tuple(undesired[site].shape)} in the undesired ones; "
                "attribute both on the same model"
            )


def _scale_to_unit(scores: Scores, normalize: str | None) -> Mapping[str, Tensor]:
    if normalize is None:
        return scores
    total = sum(float(tensor.double().abs().sum()) for tensor in scores.values())
    if total == 0:
        raise UserError("scores that are all zero cannot be normalised; look at the samples they came from")
    return {name: (tensor.double() / total).float() for name, tensor in scores.items()}


def select(
    scores: Scores,
    *,
    count: int | None = None,
    fraction: float | None = None,
    scope: str = "global",
    order: str = "lowest",
    strength: float = 1.0,
) -> Circuit:
    """The units with the lowest (or highest) scores, as a circuit. Deterministic: ties go by site order, then by index.

    Args:
        count: how many; with scope "site" in each site, with "row" in each output row.
        fraction: or which share of the units, rounded down.
        scope: "global", over all sites together; "site", in each site apart; of weights also "row", in each output row apart, or "n:m"
            such as "2:4": n of every m consecutive inputs, without count or fraction.
        order: "lowest" or "highest".
        strength: of the circuit: the share of each unit that its removal takes away.

    Raises:
        UserError: both or neither of count and fraction, more than there are, or, after a matched contrast, more than there are
            candidates below zero; a scope that does not fit the units, or an m that does not divide the rows; a strength not above 0 and up to 1.
        NonFinite: a NaN or Inf among the scores.
    """
    groups = parse_scope(scope)
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    _require_size(count, fraction, scope)
    for name, tensor in scores.items():
        if not tensor.isfinite().all():
            raise NonFinite(
                f"the scores of {name} hold a NaN or Inf at unit {int((~tensor.isfinite()).nonzero()[0][0])}; attribute again"
            )
    if scope == "row" or groups:
        masks = _in_rows(scores, count, fraction, groups, order)
    else:
        masks = {}
        for names in [list(scores)] if scope == "global" else [[name] for name in scores]:
            wanted = _wanted_count(scores, names, count, fraction, order)
            masks |= dict(
                zip(
                    names,
                    lowest([scores[name] for name in names], wanted, highest=order == "highest"),
                    strict=True,
                )
            )
    members = {name: _members(scores.unit, mask) for name, mask in masks.items() if mask.any()}
    return Circuit(
        scores.unit,
        members,
        dict(scores.provenance.get("model") or {}),
        {
            "selection": {
                "count": count,
                "fraction": fraction,
                "scope": scope,
                "order": order,
                **({"strength": strength} if strength != 1 else {}),
            },
            "scores": {**scores.provenance, "fingerprint": scores.fingerprint},
            "sizes": {name: tensor.numel() for name, tensor in scores.items()},
            "version": __version__,
        },
        strength,
    )


def parse_scope(scope: str) -> tuple[int, int] | None:
    """(2, 4) of "2:4", None of a scope with a name. Raises UserError for an unknown one, or groups that make no sense."""
    if scope in SCOPES:
        return None
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", scope)
    if not found:
        raise unknown("scope", scope, [*SCOPES, "2:4", "4:8"])
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m:
        raise UserError(
            f"scope {scope} would take {n} of every {m} inputs; give n:m with n below m and above zero, such as 2:4"
        )
    return n, m


def _require_size(count: int | None, fraction: float | None, scope: str) -> None:
    if ":" in scope:
        if count is not None or fraction is not None:
            raise UserError(f"scope {scope} says how many weights go; leave count and fraction out")
        return
    if (count is None) == (fraction is None):
        raise UserError("give either a count or a fraction of units to select")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"fraction is {fraction}; give a number from 0 up to, but not including, 1")
    if count is not None and (count < 0 or count != int(count)):
        raise UserError(f"count is {count}; give a whole number that is not negative")


def _in_rows(
    scores: Scores, count: int | None, fraction: float | None, groups: tuple[int, int] | None, order: str
) -> dict[str, Tensor]:
    """Masks that take the same number from every row, or from every group of m inputs."""
    scope = "row" if groups is None else f"{groups[0]}:{groups[1]}"
    if scores.unit != "weight":
        raise UserError(
            f"scope {scope} is for weights, and these are scores of {scores.unit}s; use scope global or site"
        )
    if _candidates_only(scores):
        raise UserError(
            f"scope {scope} takes as many of every row, and a matched contrast has candidates below zero only; use scope global or site"
        )
    masks = {}
    for name, tensor in scores.items():
        columns = tensor.shape[1]
        if groups and columns % groups[1]:
            raise UserError(
                f"scope {scope} does not divide the rows of {name}, which have {columns} inputs; choose another scope or other sites"
            )
        wanted = groups[0] if groups else count if count is not None else share_of(fraction, columns)
        if wanted > columns:
            raise UserError(
                f"{wanted} weights were asked for in each row, and the rows of {name} have {columns}; ask for fewer"
            )
        rows = tensor.reshape(-1, groups[1]) if groups else tensor
        masks[name] = lowest_in_rows(rows, wanted, highest=order == "highest").view(tensor.shape)
    return masks


def share_of(fraction: float | None, units: int) -> int:
    """That fraction of the units, rounded down as its decimal digits say: 0.29 of 100 is 29."""
    return math.floor(Fraction(str(float(fraction or 0))) * units)


def _members(unit: str, mask: Tensor) -> Any:
    return mask if unit == "weight" else tuple(mask.nonzero()[:, 0].tolist())


def count_candidates(scores: Scores) -> int:
    """How many units may be selected: all, or those below zero after a matched contrast."""
    return (
        sum(int((tensor < 0).sum()) for tensor in scores.values())
        if _candidates_only(scores)
        else scores.units
    )


def _candidates_only(scores: Scores) -> bool:
    return scores.provenance.get("contrast") == "matched"


def _wanted_count(
    scores: Scores, names: list[str], count: int | None, fraction: float | None, order: str
) -> int:
    """How many units of these sites together. Raises UserError where there are fewer."""
    there = sum(scores[name].numel() for name in names)
    wanted = int(count) if count is not None else share_of(fraction, there)
    place = "" if len(names) > 1 or len(scores) == 1 else f" in {names[0]}"
    if wanted > there:
        raise UserError(f"{wanted} {scores.unit}s were asked for and there are {there}{place}; ask for fewer")
    if (
        _candidates_only(scores)
        and order == "lowest"
        and wanted > (left := sum(int((scores[name] < 0).sum()) for name in names))
    ):
        raise UserError(
            f"{wanted} {scores.unit}s were asked for, and the matched contrast has {left} candidates below zero{place}; "
            "ask for fewer, or lower the penalty"
        )
    return wanted


def _site_seed(seed: int, site: str) -> int:
    """A seed of 63 bits for each pair of seed and site name, so that no two sites draw the same places."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}".encode()).digest()[:8], "big") >> 1


def random_like(circuit: Circuit, sizes: Mapping[str, int], seed: int) -> Circuit:
    """As many random units in each site as the circuit has there, at its strength: one draw of its null.

    Args:
        sizes: module name → number of units of that site; not looked at for weights, whose masks say it.
    """
    members: dict[str, Any] = {}
    for site, count in circuit.counts.items():
        generator = torch.Generator().manual_seed(_site_seed(seed, site))
        if circuit.unit == "weight":
            members[site] = lowest([torch.rand(circuit.members[site].shape, generator=generator)], count)[0]
        else:
            members[site] = tuple(
                torch.randperm(sizes[site], generator=generator)[:count].sort().values.tolist()
            )
    provenance: dict[str, Any] = {"null_of": circuit.fingerprint, "seed": seed, "version": __version__}
    return Circuit(circuit.unit, members, circuit.model, provenance, circuit.strength)


def exclude(scores: Scores, circuit: Circuit) -> Scores:
    """The scores with the circuit's units last in line: they get the highest score there is, and at least zero."""
    last = max(0.0, *(float(tensor.max()) for tensor in scores.values()))
    values = {name: tensor.clone() for name, tensor in scores.items()}
    for site, units in circuit.members.items():
        values[site][units if circuit.unit == "weight" else list(units)] = last
    return Scores(values, {**scores.provenance, "excluding": circuit.fingerprint})


# Which numbers are the lowest, exactly and without sorting: tensors in, bool masks out. Ties go by tensor, then by place.


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
