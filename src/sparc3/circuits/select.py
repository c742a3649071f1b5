"""Contrast and selection: from scores to a circuit. Needs no model; the scientific heart of the method."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    """Each unit's general relevance minus its relevance to the undesired behaviour; remove the lowest.

    Plain (Eq. 7): R_general − R_undesired. Matched (docs/method.md, 7):
    penalty · max(|R_general|, |R_matched|) − R_undesired, of which only units below zero are candidates.

    Args:
        matched: scores on benign completions of the same kind of prompts.
        penalty: how much a unit's use elsewhere counts against removing it; only with `matched`.
        normalize: "l1" scales each set of scores to a total absolute value of one first.

    Returns:
        Scores of the same sites and shapes.

    Raises:
        UserError: scores of different models, units, methods, sites or shapes; the message names the
            difference.
    """
    if normalize not in (None, "l1"):
        raise unknown("normalize", normalize, ("l1",))
    if matched is None and penalty != 1.0:
        raise UserError(
            f"penalty {penalty} has no effect without matched scores; pass matched scores or omit the penalty"
        )
    if not (math.isfinite(penalty) and penalty >= 0):
        raise UserError(f"penalty must be finite and not negative, such as 2, but it is {penalty}")
    sources = {"general": general, "undesired": undesired}
    if matched is not None:
        sources["matched"] = matched
    for name, scores in sources.items():
        _require_comparable(undesired, scores, name)
    scaled = {name: _scale_to_unit(scores, normalize) for name, scores in sources.items()}
    values = {}
    for site in general:
        benefit = scaled["general"][site]
        if matched is not None:
            benefit = penalty * torch.maximum(benefit.abs(), scaled["matched"][site].abs())
        values[site] = benefit - scaled["undesired"][site]
    keys = ("method", "unit", "target", "neuron", "reduce", "model")
    provenance = {
        **{key: undesired.provenance.get(key) for key in keys},
        "contrast": "plain" if matched is None else "matched",
        "penalty": penalty,
        "normalize": normalize,
        "sources": {name: scores.fingerprint for name, scores in sources.items()},
        "version": __version__,
    }
    return Scores(values, provenance)


def _require_comparable(undesired: Scores, other: Scores, name: str) -> None:
    """Raise UserError unless both score the same units of the same model with the same method."""
    models = [scores.provenance.get("model") or {} for scores in (undesired, other)]
    if models[0].get("fingerprint") != models[1].get("fingerprint"):
        raise UserError(
            f"the {name} scores are of model {models[1].get('id')} ({models[1].get('fingerprint')}) but the "
            f"undesired scores are of {models[0].get('id')} ({models[0].get('fingerprint')}); score both on "
            "the same model"
        )
    tokenizers = [scores.provenance.get("tokenizer") for scores in (undesired, other)]
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"the {name} scores were made with tokenizer {tokenizers[1]} and the undesired ones with "
            f"{tokenizers[0]}; score both with the model's own"
        )
    for key in ("unit", "method", "neuron", "epsilon"):
        expected, actual = undesired.provenance.get(key), other.provenance.get(key)
        if expected != actual:
            raise UserError(
                f"the {name} scores have {key} '{actual}' but the undesired scores have '{expected}'; "
                f"use the same {key} for both"
            )
    if unshared := set(undesired) ^ set(other):
        raise UserError(
            f"the {name} and undesired scores cover different sites (only one has {min(unshared)}); score "
            "the same sites in both"
        )
    for site, tensor in undesired.items():
        if other[site].shape != tensor.shape:
            raise UserError(
                f"{site} has shape {tuple(other[site].shape)} in the {name} scores but {tuple(tensor.shape)} "
                "in the undesired scores; score both on the same model"
            )


def _scale_to_unit(scores: Scores, normalize: str | None) -> Mapping[str, Tensor]:
    if normalize is None:
        return scores
    total = sum(float(tensor.double().abs().sum()) for tensor in scores.values())
    if total == 0:
        raise UserError("all scores are zero, so they cannot be normalised; check the samples they came from")
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
    """The units with the lowest (or highest) scores, as a circuit. Deterministic: ties go by site order, then
    by index.

    Args:
        count: the number of units to select, in total or for each site or row, as `scope` says.
        fraction: the share of the units to select instead, rounded down.
        scope: "global" ranks all sites together and "site" ranks each site separately. For weights, "row"
            ranks each output row separately, and "n:m", such as "2:4", takes n of every m consecutive inputs;
            it needs neither count nor fraction.
        order: "lowest" or "highest".
        strength: the share of each unit that ablating the circuit takes away, above 0 and up to 1.

    Raises:
        UserError: both or neither of count and fraction; more units than there are, or than there are
            candidates below zero after a matched contrast; a scope that does not fit the units or the rows; a
            strength out of range.
        NonFinite: a NaN or Inf among the scores.
    """
    groups = parse_scope(scope)
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    _require_size(count, fraction, scope)
    for name, tensor in scores.items():
        if not tensor.isfinite().all():
            raise NonFinite(
                f"the scores of {name} contain a NaN or Inf at unit "
                f"{int((~tensor.isfinite()).nonzero()[0][0])}; compute the scores again"
            )
    if scope == "row" or groups:
        masks = _select_in_rows(scores, count=count, fraction=fraction, groups=groups, order=order)
    else:
        masks = {}
        for names in [list(scores)] if scope == "global" else [[name] for name in scores]:
            total = _resolve_count(scores, names, count=count, fraction=fraction, order=order)
            ranked = lowest([scores[name] for name in names], total, highest=order == "highest")
            masks |= dict(zip(names, ranked, strict=True))
    members: dict[str, Any] = {name: mask for name, mask in masks.items() if mask.any()}
    if scores.unit != "weight":
        members = {name: tuple(mask.nonzero()[:, 0].tolist()) for name, mask in members.items()}
    selection = {"count": count, "fraction": fraction, "scope": scope, "order": order}
    provenance = {
        "selection": {**selection, **({"strength": strength} if strength != 1 else {})},
        "scores": {**scores.provenance, "fingerprint": scores.fingerprint},
        "sizes": {name: tensor.numel() for name, tensor in scores.items()},
        "version": __version__,
    }
    return Circuit(scores.unit, members, dict(scores.provenance.get("model") or {}), provenance, strength)


def parse_scope(scope: str) -> tuple[int, int] | None:
    """(2, 4) for "2:4", None for a named scope. Raises UserError for an unknown or impossible scope."""
    if scope in SCOPES:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", scope)
    if not match:
        raise unknown("scope", scope, [*SCOPES, "2:4", "4:8"])
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise UserError(
            f"scope {scope} would take {n} of every {m} inputs; use n:m with 0 < n < m, such as 2:4"
        )
    return n, m


def _require_size(count: int | None, fraction: float | None, scope: str) -> None:
    if ":" in scope:
        if count is not None or fraction is not None:
            raise UserError(f"scope {scope} already sets the number of weights; omit count and fraction")
        return
    if (count is None) == (fraction is None):
        raise UserError("pass either a count or a fraction of units to select, not both or neither")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"fraction must be at least 0 and below 1, but it is {fraction}")
    if count is not None and (count < 0 or count != int(count)):
        raise UserError(f"count must be a whole number that is not negative, but it is {count}")


def _select_in_rows(
    scores: Scores, *, count: int | None, fraction: float | None, groups: tuple[int, int] | None, order: str
) -> dict[str, Tensor]:
    """Masks that take the same number from every row, or n from every group of m inputs."""
    scope = "row" if groups is None else f"{groups[0]}:{groups[1]}"
    if scores.unit != "weight":
        raise UserError(
            f"scope {scope} is for weights, but the scores are of {scores.unit}s; use scope global or site"
        )
    if _has_candidates(scores):
        raise UserError(
            f"scope {scope} takes the same number from every row, but a matched contrast only has candidates "
            "below zero; use scope global or site"
        )
    masks = {}
    for name, tensor in scores.items():
        columns = tensor.shape[1]
        if groups and columns % groups[1]:
            raise UserError(
                f"scope {scope} does not divide the rows of {name}, which have {columns} inputs; "
                "choose another scope or other sites"
            )
        row_count = groups[0] if groups else count if count is not None else share_of(fraction, columns)
        if row_count > columns:
            raise UserError(
                f"{row_count} weights were asked for in each row, but the rows of {name} have {columns}; ask "
                "for fewer"
            )
        rows = tensor.reshape(-1, groups[1]) if groups else tensor
        masks[name] = lowest_in_rows(rows, row_count, highest=order == "highest").view(tensor.shape)
    return masks


def share_of(fraction: float | None, units: int) -> int:
    """That fraction of the units, rounded down. Exact for decimal fractions: 0.29 of 100 is 29, while
    floor(0.29 * 100) is 28 in binary floating point."""
    return math.floor(Fraction(str(float(fraction or 0))) * units)


def count_candidates(scores: Scores, scope: str = "global") -> int:
    """The largest count that `select` accepts: all units, or those below zero after a matched contrast.

    Scopes site and row count units in each site or row, so the one with the fewest decides.
    """
    if scope == "row":
        return min(tensor.shape[1] for tensor in scores.values())
    matched = _has_candidates(scores)
    counts = [int((tensor < 0).sum()) if matched else tensor.numel() for tensor in scores.values()]
    return min(counts) if scope == "site" else sum(counts)


def _has_candidates(scores: Scores) -> bool:
    return scores.provenance.get("contrast") == "matched"


def _resolve_count(
    scores: Scores, names: list[str], *, count: int | None, fraction: float | None, order: str
) -> int:
    """The number of units to select from these sites together. Raises UserError where there are fewer."""
    available = sum(scores[name].numel() for name in names)
    requested = int(count) if count is not None else share_of(fraction, available)
    site_suffix = "" if len(names) > 1 or len(scores) == 1 else f" in {names[0]}"
    if requested > available:
        raise UserError(
            f"{requested} {scores.unit}s were requested, but only {available} exist{site_suffix}; request "
            "fewer"
        )
    if _has_candidates(scores) and order == "lowest":
        candidates = sum(int((scores[name] < 0).sum()) for name in names)
        if requested > candidates:
            raise UserError(
                f"{requested} {scores.unit}s were asked for, but the matched contrast has {candidates} "
                f"candidates below zero{site_suffix}; ask for fewer, or lower the penalty"
            )
    return requested


def random_like(circuit: Circuit, sizes: Mapping[str, int], seed: int) -> Circuit:
    """A random circuit of the same strength or strengths with as many units in each site: one draw from the
    null.

    Args:
        sizes: module name → number of units of that site; not used for weights, whose masks have the shape.
    """
    members: dict[str, Any] = {}
    for site, count in circuit.counts.items():
        # 63 bits of a hash, so that no two pairs of seed and site draw the same places.
        seed_of_site = int.from_bytes(hashlib.sha256(f"{seed}:{site}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed_of_site)
        if circuit.unit == "weight":
            members[site] = lowest([torch.rand(circuit.members[site].shape, generator=generator)], count)[0]
        else:
            indices = torch.randperm(sizes[site], generator=generator)[:count]
            members[site] = tuple(indices.sort().values.tolist())
    provenance: dict[str, Any] = {"null_of": circuit.fingerprint, "seed": seed, "version": __version__}
    return replace(circuit, members=members, provenance=provenance)


def exclude(scores: Scores, circuit: Circuit) -> Scores:
    """The scores with the circuit's units ranked last: each gets the highest score, and at least zero."""
    # At least zero, because after a matched contrast only units below zero can be selected.
    last = max(0.0, *(float(tensor.max()) for tensor in scores.values()))
    values = {name: tensor.clone() for name, tensor in scores.items()}
    for site, units in circuit.members.items():
        values[site][units if circuit.unit == "weight" else list(units)] = last
    return Scores(values, {**scores.provenance, "excluding": circuit.fingerprint})


# Exact selection of the lowest numbers without sorting: tensors in, bool masks out. Ties go by tensor, then
# by index.

PIECE = 2**20
"""Numbers processed at once; the extra memory is a few times this."""
DIGIT = 16
"""Bits that one pass distinguishes."""


def lowest(tensors: Sequence[Tensor], count: int, *, highest: bool = False) -> list[Tensor]:
    """Masks of the `count` lowest (or highest) finite numbers of all tensors together, each in its tensor's
    shape.

    A radix select: the floats become integers of the same order and are counted by their first 16 bits; those
    that share the threshold's first 16 bits are counted by the next 16, until every bit of the threshold is
    known.
    """
    float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors]
    if count == 0:
        return masks
    threshold, below = _find_threshold(tensors, count, float64, highest)
    ties = count - below
    for tensor, mask in zip(tensors, masks, strict=True):
        flat = mask.view(-1)
        for start, keys in _iterate_keys(tensor, float64, highest):
            part = flat[start : start + len(keys)]
            torch.lt(keys, threshold, out=part)
            if ties:
                tied = (keys == threshold).nonzero()[:ties, 0]
                part[tied] = True
                ties -= len(tied)
    return masks


def _find_threshold(tensors: Sequence[Tensor], count: int, float64: bool, highest: bool) -> tuple[int, int]:
    """The key of the count-th lowest number, and how many numbers are below it."""
    bits = 64 if float64 else 32
    below, prefix = 0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        # How many of the numbers that share the threshold's earlier digits have each value of this one.
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for tensor in tensors:
            for _, keys in _iterate_keys(tensor, float64, highest):
                if not first:
                    keys = keys[keys >> (shift + DIGIT) == prefix]
                # The first digit holds the sign, so it is shifted to start at 0, as bincount needs.
                digits = (keys >> shift) + 2 ** (DIGIT - 1) if first else keys >> shift & (2**DIGIT - 1)
                counts += torch.bincount(digits, minlength=2**DIGIT)
        sums = below + counts.cumsum(0)
        digit = int(torch.searchsorted(sums, count))
        below = int(sums[digit] - counts[digit])
        prefix = digit - 2 ** (DIGIT - 1) if first else (prefix << DIGIT) + digit
    return prefix, below


def _iterate_keys(tensor: Tensor, float64: bool, highest: bool) -> Iterator[tuple[int, Tensor]]:
    """Pieces of the tensor as (start, integers in the same order as the floats); −0 and 0 are equal."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to(torch.float64 if float64 else torch.float32)
        piece = piece + 0.0  # −0 + 0 = 0
        keys = piece.view(torch.int64 if float64 else torch.int32)
        # A negative float's bits, read as an integer, decrease as it grows (IEEE 754): flip all but the sign.
        keys = keys ^ (keys >> (63 if float64 else 31) & (2**63 - 1 if float64 else 2**31 - 1))
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
        # Of the numbers equal to the threshold, the first ones fill the row up to its count.
        ties &= ties.cumsum(1, dtype=torch.int32) <= count - below.sum(1, keepdim=True)
        mask[start : start + step] = below | ties
    return mask
