"""Results: variants by name, and a provenance by its sections; files keep their keys and strings."""

from pathlib import Path

import pytest
from finished_run import finished

from sparc3.results import Candidate, Check, Provenance, Results, Search, Variant


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("original", Variant("original")),
        ("wanda@40", Variant("wanda", 40)),
        ("random@40.2", Variant("random", 40, "2")),
        ("lrp-abs@7.seed1", Variant("lrp-abs", 7, "seed1")),
        ("a@b@3", Variant("a@b", 3)),
        ("a@b", Variant("a@b")),
        ("@3", Variant("@3")),
        ("wanda@4.", Variant("wanda@4.")),
        ("wanda@٣", Variant("wanda@٣")),
        ("wanda, 2 samples", Variant("wanda, 2 samples")),
    ],
)
def test_a_variant_is_read_as_it_is_written(name: str, variant: Variant) -> None:
    assert Variant.parse(name) == variant
    assert str(variant) == name


def test_a_provenance_writes_what_it_was_given_and_nothing_else() -> None:
    written = Provenance(recipe="r", circuit="c", checks=[Check("n", 0.5)], warnings=[]).to_dict()
    assert written == {
        "recipe": "r",
        "circuit": "c",
        "checks": [{"name": "n", "value": 0.5, "ok": None}],
        "warnings": [],
    }
    assert (Provenance().job, Provenance().protected) == ("correct", None)


def test_a_search_keeps_its_figures_as_they_are() -> None:
    best = Candidate({}, "abs", "matched", 1, None, 4, "c", {"perplexity": 3})
    search = Search(aim="rur.mean", original={"perplexity": 3}, best=best)
    assert list(search.to_dict()) == ["aim", "original", "best"]
    assert type(search.to_dict()["best"]["penalty"]) is int
    assert type(search.to_dict()["original"]["perplexity"]) is int


def test_an_old_file_has_its_sections(tmp_path: Path) -> None:
    results = Results.load(finished(tmp_path / "run") / "results.json")
    read = results.read_provenance()
    assert read.tune is not None
    assert (read.tune.best.count, read.tune.best.rounds) == (40, 1)
    assert [one.variant for one in read.overlaps] == ["gradient@40", "wanda@10"]
    assert read.scorers is not None
    assert read.scorers.means[1].change_ci95 == (-0.34, -0.28)
    assert read.stages[1].seconds == 41.2


def test_null_is_as_if_not_there() -> None:
    read = Results((), (), {"recipe": None, "checks": None, "protected": None}).read_provenance()
    assert (read.recipe, read.checks, read.protected) == ("", [], None)


def test_a_section_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="checks"):
        Results((), (), {"checks": [3]}).read_provenance()
