"""Fitting: how much of each neuron to remove, or to add, for the largest effect at a given damage."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import NonFinite, UserError
from ..scores import Scores
from .circuit import Circuit
from .select import lowest

SENSITIVITY = {"method": "gradient", "neuron": "signed", "target": "logprob", "reduce": "rms"}
"""Options of the attribution that measures how sensitive general text is to each neuron's gain."""
SLOPE = {**SENSITIVITY, "reduce": "mean"}
"""Options of the attribution that measures which way each neuron's gain moves the loss of general text."""
FLOOR = 0.1
"""This share of the mean of h is added to each, so that a neuron that the general texts hardly fire is not
taken for free."""


def fit(
    effect: Scores,
    sensitivity: Scores,
    *,
    count: int,
    damage: float,
    without: Circuit | None = None,
    slope: Scores | None = None,
    repair: float = 0.0,
) -> Circuit:
    """A strength for each of `count` neurons, with which the effect falls most at a damage to general text
    (docs/method.md, 8).

    To first order, taking the share s_i of neuron i lowers the effect by Σ e_i s_i; to second order, and
    without what neurons do together, it moves the predictions of general text by D = ½ Σ h_i s_i² nats a
    token, with h the diagonal of the Fisher information of the neurons' gains. The best s_i at a given D is μ
    e_i / h_i. It is cut to −1 … 1, and the neurons are those with the largest e_i² / h_i.

    With a repair ρ the strengths also lower the loss of general text, to first order by Σ c_i s_i, where c_i
    is the derivative of the loss by the gain: s_i is (μ e_i + ρ c_i) / h_i, and D is ½ Σ h_i s_i² − ρ Σ c_i
    s_i.

    Args:
        effect: e, signed scores of what should become less likely, such as those of target words.
        sensitivity: √h, scores of general text by `SENSITIVITY`.
        count: how many neurons.
        damage: D in nats a token. It leaves out how neurons interact, so measure what it costs.
        without: neurons to leave as they are.
        slope: −c, scores of general text by `SLOPE`; only for a repair.
        repair: ρ, the share of the step c_i / h_i that is taken, from 0 to 1.

    Raises:
        UserError: scores of other units, models or sites, or that were made in another way; fewer neurons
            than `count` with an effect; a damage that is not above 0; a repair outside 0 to 1, or without a
            slope.
        NonFinite: a NaN or Inf among the scores.
    """
    if not damage > 0:
        raise UserError(f"damage must be above 0, such as 0.003 nats a token, but it is {damage}")
    if not 0 <= repair <= 1:
        raise UserError(f"repair must be from 0 to 1, such as 0.3, but it is {repair}")
    if repair and slope is None:
        raise UserError("a repair needs the slope of general text: scores by reduce mean")
    if slope is not None:
        _require_fit_for_each_other(effect, slope, SLOPE)
    gain = gain_by_damage(effect, sensitivity, without=without)
    available = sum(int((tensor < 0).sum()) for tensor in gain.values())
    if not 0 < count <= available:
        raise UserError(
            f"{count} neurons were asked for, of {available} with an effect; give from 1 to {available}"
        )
    masks = dict(zip(gain, lowest(list(gain.values()), count), strict=True))
    curvatures = _curvatures(sensitivity, effect)
    e = torch.cat([effect[name].double()[mask] for name, mask in masks.items()])
    h = torch.cat([curvatures[name][mask] for name, mask in masks.items()])
    c = torch.zeros_like(e)
    if slope is not None:
        c = -repair * torch.cat([slope[name].double()[mask] for name, mask in masks.items()])
    fitted = iter(_strengths_at(e, h, c, damage).tolist())
    members = {name: tuple(mask.nonzero()[:, 0].tolist()) for name, mask in masks.items()}
    # Four digits, which a reader can check and a file can hold.
    strengths = {name: tuple(float(f"{next(fitted):.4g}") for _ in units) for name, units in members.items()}
    provenance: dict[str, Any] = {
        "selection": {"count": count, "damage": damage, **({"repair": repair} if repair else {})},
        "scores": {**effect.provenance, "fingerprint": effect.fingerprint},
        "sensitivity": sensitivity.fingerprint,
        **({"slope": slope.fingerprint} if slope is not None and repair else {}),
        "sizes": {name: tensor.numel() for name, tensor in effect.items()},
        "version": __version__,
    }
    return Circuit(
        "neuron",
        {name: units for name, units in members.items() if units},
        dict(effect.provenance.get("model") or {}),
        provenance,
        strengths={name: values for name, values in strengths.items() if values},
    )


def gain_by_damage(effect: Scores, sensitivity: Scores, *, without: Circuit | None = None) -> Scores:
    """−e_i² / h_i of each neuron, by which `fit` ranks them, the lowest first; 0 for the neurons of
    `without`. Raises as `fit` does."""
    _require_fit_for_each_other(effect, sensitivity, SENSITIVITY)
    values = {}
    for name, h in _curvatures(sensitivity, effect).items():
        values[name] = (-effect[name].double().square() / h).float()
        if without is not None and name in without.members:
            values[name][list(without.members[name])] = 0
    sources = {"undesired": effect.fingerprint, "general": sensitivity.fingerprint}
    provenance = {**effect.provenance, "contrast": "fitted", "sources": sources, "version": __version__}
    return Scores(values, provenance)


def _curvatures(sensitivity: Scores, order: Iterable[str]) -> dict[str, Tensor]:
    """h of each neuron, with the floor, in float64, by sites in this order."""
    squares = {name: sensitivity[name].double().square() for name in order}
    floor = FLOOR * torch.cat(list(squares.values())).mean()
    return {name: square + floor for name, square in squares.items()}


def _strengths_at(e: Tensor, h: Tensor, c: Tensor, damage: float) -> Tensor:
    """(μ e + c) / h, cut to −1 … 1, with the largest μ that keeps ½ Σ h s² − Σ c s within the damage."""
    low, high = 0.0, float(((h + c.abs()) / e.abs()).max())  # at the upper end, all strengths are cut
    for _ in range(100):  # bisection: the cost grows with μ
        middle = (low + high) / 2
        s = ((middle * e + c) / h).clamp(-1, 1)
        low, high = (low, middle) if float((0.5 * h * s.square() - c * s).sum()) > damage else (middle, high)
    return ((low * e + c) / h).clamp(-1, 1)


def _require_fit_for_each_other(effect: Scores, general: Scores, wanted_options: dict[str, str]) -> None:
    for name, scores in (("undesired", effect), ("general", general)):
        if scores.unit != "neuron" or scores.provenance.get("neuron", "signed") != "signed":
            raise UserError(
                f"strengths are fitted to signed scores of neurons, but the {name} scores are of "
                f"{scores.unit}s, {scores.provenance.get('neuron')}; score with --neuron signed"
            )
        if any(not tensor.isfinite().all() for tensor in scores.values()):
            raise NonFinite(f"the {name} scores contain a NaN or Inf; compute them again")
    for key, wanted in wanted_options.items():
        if general.provenance.get(key, wanted) != wanted:
            raise UserError(
                f"the general scores have {key} '{general.provenance[key]}', but a fit needs '{wanted}'; "
                f"score general text with --{key} {wanted}"
            )
    models = [(scores.provenance.get("model") or {}).get("fingerprint") for scores in (effect, general)]
    shapes = [{name: tensor.shape for name, tensor in scores.items()} for scores in (effect, general)]
    if models[0] != models[1] or shapes[0] != shapes[1]:
        raise UserError("the general and undesired scores are of other models or sites; score both alike")
