"""Neuron cards: what one removed neuron reacts to, what it writes, and what removing it alone does. They are
saved as cards.json (`sparc3.cards/1`)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__, distributed
from ..attribution.activations import capture, encode_whole
from ..circuits.circuit import Circuit
from ..evaluation.evaluate import fingerprint_samples
from ..evaluation.statistics import measurement
from ..models.load import rope_switches
from ..models.offloading import device_of, value_of
from ..models.sites import Site, down_sites, family_of, open_experts, sites_of
from ..samples.batches import Batch, make_batches
from ..samples.reference_set import ReferenceSet
from ..samples.tokens import token_text
from ..scores import Scores
from ..storage import fingerprint, write_json
from .measure import load_or_make_evaluation
from .run_folder import RunContext, read_if_current
from .score import SelectedCircuit
from .work_list import has_cards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sparc3")
FORMAT = "sparc3.cards/1"
TOKENS, PROMPTS = 10, 3
"""Numbers of tokens and prompts on a card."""
SETS = ("general", "undesired")
SHOWN = ("toxicity.mean", "rur.mean", "ioi.accuracy", "perplexity", "kl")

Unit = tuple[Site, int]
Fired = list[dict[str, Any]]


def make_cards(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    circuit: Circuit,
    *,
    contrast: Scores,
    parts: Mapping[str, Scores],
    samples: ReferenceSet,
    most: int = 50,
    alone: int = 0,
    measure: Callable[[Circuit], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """A card for each of the circuit's neurons, those with the lowest contrast first; none for other units.

    Args:
        contrast: decides the order.
        parts: scores of "general" and "undesired", which the cards show.
        samples: the texts in which to look for high activations.
        most: the largest number of cards.
        alone: number of cards, from the first, with the effect of removing that unit alone.
        measure: (circuit of that unit alone, with the circuit's strength) → that effect, metric → value.
    """
    if circuit.unit != "neuron":
        return []
    sites = {site.name: site for site in sites_of(model, ("mlp.up",))}
    units = [
        (sites[name], index) for name in circuit.members if name in sites for index in circuit.members[name]
    ]
    units = sorted(units, key=lambda unit: float(contrast[unit[0].name][unit[1]]))[:most]
    fired = _find_strongest_activations(model, tokenizer, units, samples) if units else []
    cards = []
    for number, ((site, index), occurrences) in enumerate(zip(units, fired, strict=True)):
        # A neuron that fires negatively writes its column with the opposite sign, which swaps the tokens that
        # it promotes with those that it suppresses.
        sign = -1.0 if occurrences and occurrences[0]["activation"] < 0 else 1.0
        promotes, suppresses = _find_promoted_tokens(model, tokenizer, site, index, sign)
        circuit_of_one = replace(circuit.with_units({site.name: (index,)}), provenance={})
        card = {
            "module": site.name,
            "layer": site.layer,
            "index": index,
            **({"strength": circuit_of_one.strengths[site.name][0]} if circuit_of_one.strengths else {}),
            **{name: float(parts[name][site.name][index]) for name in SETS if name in parts},
            "promotes": promotes,
            "suppresses": suppresses,
            "fired": occurrences,
        }
        if measure and number < alone:
            card["alone"] = measure(circuit_of_one)
        cards.append(card)
    return cards


def _find_promoted_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", site: Site, index: int, sign: float
) -> tuple[list[str], list[str]]:
    """The tokens whose logits the neuron's output column raises and lowers most (nostalgebraist's logit lens;
    Geva et al. 2022).

    The final norm's gain is included, and a LayerNorm's centring; norms between the MLP and the residual
    stream are not.

    Args:
        sign: −1 for a neuron whose strongest activation is negative.
    """
    down = down_sites(model)[site.mlp]
    head = model.get_output_embeddings()
    if down.is_quantised or head is None:
        return [], []
    with torch.no_grad():
        column = _apply_final_norm(model, down.stored_weight[:, index].float() * sign)
        weight = value_of(head, "weight")
        if column.shape[0] != weight.shape[1]:
            return [], []
        logits = weight.float() @ column.to(weight.device)
        order = logits.argsort(descending=True).tolist()
    return _readable_tokens(tokenizer, order), _readable_tokens(tokenizer, order[::-1])


def _apply_final_norm(model: "PreTrainedModel", column: Tensor) -> Tensor:
    # The final norm has another name in every family (norm, ln_f, final_layer_norm), but it is always beside
    # the list of layers, and the last of the norms there.
    family = family_of(model)
    parent = model.get_submodule(family.layers.rpartition(".")[0])
    children = [child for name, child in parent.named_children() if "embed" not in name]
    norms = [child for child in children if "Norm" in type(child).__name__]
    if norms:
        gain = value_of(norms[-1], "weight") if getattr(norms[-1], "weight", None) is not None else None
        column = column if "RMS" in type(norms[-1]).__name__ else column - column.mean()
        if isinstance(gain, Tensor) and gain.shape == column.shape:
            column = column * (gain.float().to(column.device) + (1.0 if family.gain_from_one else 0.0))
    projection = getattr(parent, "project_out", None)  # OPT 350m: hidden size 1024, embeddings of 512
    if isinstance(projection, nn.Linear):
        column = value_of(projection, "weight").float().to(column.device) @ column
    return column


def _readable_tokens(tokenizer: "PreTrainedTokenizerBase", order: Sequence[int]) -> list[str]:
    """The first tokens that are readable text, each with its leading space."""
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    for token in order:
        if token in special or token >= len(tokenizer):
            continue
        text = token_text(tokenizer, token)
        if text.strip() and "\ufffd" not in text and text not in texts:
            texts.append(text)
        if len(texts) == TOKENS:
            break
    return texts


def _find_strongest_activations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    units: Sequence[Unit],
    samples: ReferenceSet,
) -> list[Fired]:
    """For each unit, the samples with the largest absolute activation (the input of mlp.down), each cut after
    the token where it occurred."""
    encoded = encode_whole(model, samples, tokenizer)
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    ids = {sample.index: sample.ids for sample in encoded}
    best: list[list[tuple[float, int, int]]] = [[] for _ in units]
    for batch in make_batches(encoded, 1024, device_of(model), rope_switches(model)):
        # Leave out special tokens: many neurons always fire at the start token, which says nothing about
        # them.
        readable = batch.mask().cpu() & ~torch.isin(batch.ids.cpu(), special)
        for unit_index, (values, positions) in enumerate(_largest_entries(model, batch, units, readable)):
            rows = [(values[row], sample.index, positions[row]) for row, sample in enumerate(batch.samples)]
            best[unit_index] = sorted([*best[unit_index], *rows], key=lambda row: (-abs(row[0]), row[1]))[
                :PROMPTS
            ]

    def describe(value: float, number: int, position: int) -> dict[str, Any]:
        prompt = str(tokenizer.decode(ids[number][: position + 1], skip_special_tokens=True))
        return {"prompt": prompt, "token": token_text(tokenizer, ids[number][position]), "activation": value}

    return [[describe(*row) for row in rows] for rows in best]


def _largest_entries(
    model: "PreTrainedModel", batch: Batch, units: Sequence[Unit], mask: Tensor
) -> list[tuple[list[float], list[int]]]:
    """For each unit, (activation, position) lists with one entry per row of the batch: the largest absolute
    activation at the positions where `mask` [B, T] is true."""
    indices: dict[str, list[int]] = {}
    for site, index in units:
        indices.setdefault(site.name, []).append(index)
    downs = down_sites(model)
    gathered: dict[str, Iterator[Tensor]] = {}

    def receive(name: str, a: Tensor) -> None:
        gathered[name] = iter(a[..., indices[name]].float().cpu().unbind(-1))

    sites = {site.name: downs[site.mlp] for site, _ in units}
    with open_experts(model), torch.no_grad(), capture(sites, mask, receive):
        model.base_model(input_ids=batch.ids, use_cache=False)
    values = [next(gathered[site.name]) for site, _ in units]
    positions = [a.abs().argmax(1) for a in values]
    return [
        (a.gather(1, position[:, None])[:, 0].tolist(), position.tolist())
        for a, position in zip(values, positions, strict=True)
    ]


# The cards stage: cards.json for the report.


def write_cards(work: RunContext, selected: SelectedCircuit) -> None:
    """Write cards.json, unless an existing one was made from the same circuit, samples and settings. Does
    nothing for units without cards."""
    settings = work.recipe.cards
    if not has_cards(work.recipe):
        return
    samples = work.references["undesired"]
    made_from = fingerprint(
        {
            "circuit": selected.circuit.fingerprint,
            "contrast": selected.contrast.fingerprint,
            "samples": samples.fingerprint,
            "settings": settings.model_dump(),
            "on": fingerprint_samples(work.prepared) if settings.alone else None,
            "version": __version__,
        }
    )
    if content := read_if_current(work, "cards.json", FORMAT, made_from):
        log.info("cards.json exists and fits")
        work.reused_files.append("cards.json")
        for card in (card for card in content["cards"] if "alone" in card):
            work.claim(f"evaluation/alone/{card['module']}.{card['index']}.json")
        return

    def measure_alone(circuit: Circuit) -> dict[str, float]:
        ((module, (index,)),) = circuit.members.items()
        evaluation = load_or_make_evaluation(work, f"alone/{module}.{index}", circuit)
        figures = {
            o.metric: measurement(o, "alone").value for o in evaluation.observations if o.metric in SHOWN
        }
        return {name: value for name, value in figures.items() if value is not None}

    cards = make_cards(
        work.model,
        work.tokenizer,
        selected.circuit,
        contrast=selected.contrast,
        parts=selected.parts,
        samples=samples,
        most=settings.most,
        alone=settings.alone,
        measure=measure_alone,
    )
    if distributed.is_main():
        write_json(work.folder / "cards.json", {"format": FORMAT, "made_from": made_from, "cards": cards})
    distributed.wait()
    alone = sum("alone" in card for card in cards)
    log.info("cards: %d, %d with the effect of the unit alone", len(cards), alone)
