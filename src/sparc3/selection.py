"""Contrast and selection: from scores to a circuit. Needs no model; the scientific heart of the method."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .circuit import Circuit
from .errors import NonFinite, UserError, unknown
from .scores import Scores
from .version import __version__

SCOPES = ("global", "site")
ORDERS = ("lowest", "highest")


def contrast(
    general: Scores, undesired: Scores, *, matched: Scores | None = None, penalty: float = 1.0, normalize: str | None = None
) -> Scores:
    """What a unit gives in general, less what it gives to the undesired behaviour; the lowest are to be removed.

    Plain (Eq. 7): R_general − R_undesired. Matched (design, 2.7): penalty · max(|R_general|, |R_matched|) − R_undesired,
    of which only units below zero are candidates.

    Args:
        matched: scores on benign completions of the same kind of prompts.
        penalty: how much a unit's use elsewhere counts against removing it; only with `matched`.
        normalize: "l1" scales each set of scores to a total absolute value of one first.

    Raises:
        UserError: scores of different models, units, sites or shapes (the message names them), or of unlike settings.
    """
    if normalize not in (None, "l1"):
        raise unknown("normalize", normalize, ("l1",))
    if matched is None and penalty != 1.0:
        raise UserError(f"penalty {penalty} without matched scores has no effect; give the matched scores, or leave it out")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise UserError(f"penalty is {penalty}; give a number that is not negative, such as 2")
    parts = {"general": general, "undesired": undesired, **({"matched": matched} if matched is not None else {})}
    for name, scores in parts.items():
        _require_fit(undesired, scores, name)
    ready = {name: _scaled(scores, normalize) for name, scores in parts.items()}
    values = {}
    for site in general:
        if matched is None:
            values[site] = ready["general"][site] - ready["undesired"][site]
        else:
            values[site] = penalty * torch.maximum(ready["general"][site].abs(), ready["matched"][site].abs()) - ready["undesired"][site]
    provenance = {
        **{key: undesired.provenance.get(key) for key in ("method", "unit", "target", "neuron", "reduce", "model")},
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
            raise UserError(f"the {name} scores have {key} '{theirs.get(key)}', the undesired ones '{mine.get(key)}'; attribute both the same way")
    if set(undesired) != set(other):
        odd = sorted(set(undesired) ^ set(other))[0]
        raise UserError(f"the {name} and undesired scores are of different sites ({odd} is in one only); attribute both at the same sites")
    for site in undesired:
        if undesired[site].shape != other[site].shape:
            raise UserError(
                f"{site} has shape {tuple(other[site].shape)} in the {name} scores and {tuple(undesired[site].shape)} in the undesired ones; "
                "attribute both on the same model"
            )


def _scaled(scores: Scores, normalize: str | None) -> Mapping[str, Tensor]:
    if normalize is None:
        return scores
    total = sum(float(tensor.double().abs().sum()) for tensor in scores.values())
    if total == 0:
        raise UserError("scores that are all zero cannot be normalised; look at the samples they came from")
    return {name: (tensor.double() / total).float() for name, tensor in scores.items()}


def select(
    scores: Scores, *, count: int | None = None, fraction: float | None = None, scope: str = "global", order: str = "lowest"
) -> Circuit:
    """The units with the lowest (or highest) scores, as a circuit. Deterministic: ties go by site order, then by index.

    Args:
        count: how many; with scope "site", in each site.
        fraction: or which share of the units, rounded down.
        scope: "global", over all sites together, or "site", in each site apart.
        order: "lowest" or "highest".

    Raises:
        UserError: both or neither of count and fraction, more than there are, or, after a matched contrast, more than there are
            candidates below zero.
        NonFinite: a NaN or Inf among the scores.
    """
    for kind, value, known in (("scope", scope, SCOPES), ("order", order, ORDERS)):
        if value not in known:
            raise unknown(kind, value, known)
    if (count is None) == (fraction is None):
        raise UserError("give either a count or a fraction of units to select")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"fraction is {fraction}; give a number from 0 up to, but not including, 1")
    if count is not None and (count < 0 or count != int(count)):
        raise UserError(f"count is {count}; give a whole number that is not negative")
    for name, tensor in scores.items():
        if not tensor.isfinite().all():
            raise NonFinite(f"the scores of {name} hold a NaN or Inf at unit {int((~tensor.isfinite()).nonzero()[0][0])}; attribute again")
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    members: dict[str, tuple[int, ...]] = {}
    for names in groups:
        members |= _chosen(scores, names, count, fraction, order, _candidates_only(scores))
    selection = {"count": count, "fraction": fraction, "scope": scope, "order": order}
    provenance = {"selection": selection, "scores": {**scores.provenance, "fingerprint": scores.fingerprint}, "version": __version__}
    return Circuit(scores.unit, members, dict(scores.provenance.get("model") or {}), provenance)


def candidates(scores: Scores) -> int:
    """How many units may be selected: all, or those below zero after a matched contrast."""
    return sum(int((tensor < 0).sum()) for tensor in scores.values()) if _candidates_only(scores) else scores.units


def _candidates_only(scores: Scores) -> bool:
    return scores.provenance.get("contrast") == "matched"


def _chosen(
    scores: Scores, names: list[str], count: int | None, fraction: float | None, order: str, below_zero: bool
) -> dict[str, tuple[int, ...]]:
    flat = torch.cat([scores[name].reshape(-1) for name in names])
    wanted = count if count is not None else int((fraction or 0) * flat.numel())
    place = "" if len(names) > 1 or len(scores) == 1 else f" in {names[0]}"
    if wanted > flat.numel():
        raise UserError(f"{wanted} {scores.unit}s were asked for and there are {flat.numel()}{place}; ask for fewer")
    if below_zero and order == "lowest" and wanted > (left := int((flat < 0).sum())):
        raise UserError(
            f"{wanted} {scores.unit}s were asked for, and the matched contrast has {left} candidates below zero{place}; "
            "ask for fewer, or lower the penalty"
        )
    first = torch.sort(flat, stable=True, descending=order == "highest").indices[:wanted].sort().values
    members: dict[str, tuple[int, ...]] = {}
    start = 0
    for name in names:
        inside = first[(first >= start) & (first < start + scores[name].numel())] - start
        if len(inside):
            members[name] = tuple(inside.tolist())
        start += scores[name].numel()
    return members


def random_like(circuit: Circuit, sizes: Mapping[str, int], seed: int) -> Circuit:
    """As many random units in each site as the circuit has there: one draw of its null.

    Args:
        sizes: module name → number of units of that site.
    """
    members = {}
    for site, indices in circuit.members.items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(map(ord, site)))
        members[site] = tuple(torch.randperm(sizes[site], generator=generator)[: len(indices)].sort().values.tolist())
    provenance: dict[str, Any] = {"null_of": circuit.fingerprint, "seed": seed, "version": __version__}
    return Circuit(circuit.unit, members, circuit.model, provenance)


def union(one: Circuit, other: Circuit) -> Circuit:
    """The units of either circuit, with the model of the first and the provenance of the second. Raises UserError where their units differ."""
    if one.unit != other.unit:
        raise UserError(f"a circuit of {one.unit}s and one of {other.unit}s have no union")
    members = {site: tuple(sorted({*one.members.get(site, ()), *other.members.get(site, ())})) for site in {**one.members, **other.members}}
    return Circuit(one.unit, members, one.model, other.provenance)


def excluding(scores: Scores, circuit: Circuit) -> Scores:
    """The scores with the circuit's units last in line: they get the highest score there is, and at least zero."""
    last = max(0.0, *(float(tensor.max()) for tensor in scores.values()))
    values = {name: tensor.clone() for name, tensor in scores.items()}
    for site, indices in circuit.members.items():
        values[site][list(indices)] = last
    return Scores(values, {**scores.provenance, "excluding": circuit.fingerprint})
