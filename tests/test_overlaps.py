"""What circuits share, by hand."""

import pytest
import torch

from sparc3.circuits.ablate import Damping
from sparc3.circuits.circuit import Circuit
from sparc3.circuits.select import select
from sparc3.experiment.measure import measure_kept_overlaps, measure_overlaps
from sparc3.results import Overlap
from sparc3.scores import Scores

SIZES = {"a": 6, "b": 4}


def test_shared_units_of_circuits_of_dampings_and_of_several_draws() -> None:
    own = Circuit("neuron", {"a": (0, 1, 2), "b": (0,)}, {"id": "m", "fingerprint": "f"})
    others = {
        "wanda@4": [Circuit("neuron", {"a": (1, 2), "b": (1, 2)})],
        "aura@2": [Damping({"a": torch.tensor([0.5, 1, 1, 1, 1, 1]), "b": torch.tensor([1, 1, 1, 0.2])})],
        "random@4": [Circuit("neuron", {"b": (0, 1, 2, 3)}), Circuit("neuron", {"a": (0, 1, 2), "b": (0,)})],
    }
    found = {one.variant: (one.size, one.both, one.expected) for one in measure_overlaps(own, others, SIZES)}
    assert found == {
        "wanda@4": (4, 2, pytest.approx(1.6)),
        "aura@2": (2, 1, pytest.approx(0.8)),
        "random@4": (4, 2.5, pytest.approx(1.6)),
    }


def test_what_is_left_when_units_go() -> None:
    lrp = Scores(
        {"a": torch.tensor([0.0, 1, 2, 3, 9, 8]), "b": torch.tensor([0.0, 1, 2, 7])}
    )  # keeps a4 a5 b3 of 3
    wanda = Scores(
        {"a": torch.tensor([0.0, 1, 2, 9, 3, 8]), "b": torch.tensor([7.0, 1, 2, 0])}
    )  # keeps a3 a5 b0
    gone = {"lrp": select(lrp, count=7), "wanda": select(wanda, count=7)}
    assert measure_kept_overlaps([gone], "lrp", SIZES) == [Overlap("wanda@7", 3, 1, pytest.approx(0.9))]
    less = {"lrp": gone["lrp"], "wanda": select(wanda, fraction=0.5, scope="site")}  # keeps a3 a5 a4, b0 b2
    assert measure_kept_overlaps([less], "lrp", SIZES) == [Overlap("wanda@5", 5, 2, pytest.approx(1.5))]
    assert measure_kept_overlaps([{"wanda": gone["wanda"]}], "lrp", SIZES) == []
