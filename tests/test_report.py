"""The report: everything the run measured is on the page, as measured; nothing a model wrote can act; nothing is asked of the network."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from finished_run import BREAKOUT, SCRIPT, SIZE, finished, measurement, site

from sparc3.circuits.circuit import Circuit
from sparc3.errors import DamagedFile, UserError
from sparc3.report.cards import list_protected, list_shared
from sparc3.report.charts import Scale, spread
from sparc3.report.examples import Mask, find_changes, heat_maps
from sparc3.report.examples import kinds as texts_by_kind
from sparc3.report.headline import headline, remarks
from sparc3.report.read import read_folder
from sparc3.report.tradeoff import tradeoffs
from sparc3.report.words import change, figure, format_p, format_with_interval, method_title, word_list
from sparc3.report.write import write_report
from sparc3.results import Difference, Measurement, Results
from sparc3.safe_text import visible
from sparc3.samples.chat import show
from sparc3.samples.reference_set import ReferenceSet, Sample
from sparc3.scores import Scores
from sparc3.storage import write_json
from sparc3.verdict import judge_change


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished(tmp_path / "run")


class Page(HTMLParser):
    """The page as a browser takes it: its tags, its visible text, its ids."""

    VOID = ("meta", "link", "br", "input", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.unbalanced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in ("li", "p"):
            self.open.pop()
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    @property
    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def save_weight_circuit(run: Path) -> None:
    """Put a circuit of 40 weights in place of the 40 neurons, found with LRP as they were."""
    (run / "circuit.json").unlink()
    mask = torch.zeros(SIZE, 8, dtype=torch.bool)
    mask.flatten()[:40] = True
    found = {"scores": {"method": "lrp"}, "selection": {"order": "lowest"}}
    Circuit("weight", {site(0): mask}, {"id": "demo-llama", "fingerprint": "0123456789abcdef"}, found).save(
        run / "circuit.safetensors"
    )
    Scores({site(0): torch.randn(SIZE, 8)}, {"method": "lrp", "unit": "weight"}).save(
        run / "scores" / "contrast.safetensors"
    )


# What is on the page -------------------------------------------------------------------------------------------------


def test_the_page_has_every_section_and_is_small(run: Path) -> None:
    path = write_report(run)
    read = Page(path.read_text(encoding="utf-8"))
    assert path == run / "report.html"
    assert path.stat().st_size < 5_000_000
    assert {
        "change",
        "curves",
        "methods",
        "where",
        "texts",
        "tokens",
        "cards",
        "figures",
        "checks",
        "again",
    } <= read.ids
    assert not read.unbalanced
    assert not read.open
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= read.ids


def test_every_figure_on_the_page_is_the_one_measured(run: Path) -> None:
    text = page(run).text
    for m in Results.load(run / "results.json"):
        value, _, interval = format_with_interval(m).partition(" ")
        assert value in text, m
        assert interval in text, m
    assert "40 of 2,048 neurons" in text
    assert "p = 0.0001" in text


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_results_alone_make_a_page_that_invents_nothing(tmp_path: Path) -> None:
    Results((measurement("rouge.l", "original", 0.3, 0.01),)).save(tmp_path / "results.json")
    read = page(tmp_path)
    assert {"figures", "again"} <= read.ids
    assert not {"curves", "where", "texts", "cards", "methods", "checks", "change"} & read.ids
    assert "rouge l" in read.text
    assert "neuron" not in read.text


OPTIONAL = (
    "circuit.json",
    "scores/contrast.safetensors",
    "evaluation/original.json",
    "cards.json",
    "tokens.json",
    "recipe.yaml",
    "environment.json",
)


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_missing_file_only_drops_its_part(run: Path, missing: str) -> None:
    (run / missing).unlink()
    read = page(run)
    assert {"figures", "curves", "again"} <= read.ids
    assert not read.unbalanced


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)


def test_damaged_files_are_named(run: Path) -> None:
    (run / "environment.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"environment\.json"):
        write_report(run)


def test_a_circuit_of_weights_has_its_count_its_null_and_its_rivals(run: Path) -> None:
    save_weight_circuit(run)
    folder = read_folder(run)
    assert folder.unit == "weight"
    assert f"40 of {SIZE * 8:,} weights" in str(headline(folder))
    assert "40 random weights" in str(headline(folder))
    assert {point.method for point in folder.rival_points("toxicity.mean")} == {"wanda", "gradient", "random"}
    assert not page(run).unbalanced


def test_half_a_million_neurons_make_a_small_page(run: Path) -> None:
    modules = {site(layer): torch.randn(14336) for layer in range(32)}
    Scores(modules, {"method": "lrp", "unit": "neuron"}).save(run / "scores" / "contrast.safetensors")
    Circuit("neuron", {name: tuple(range(0, 14336, 4096)) for name in modules}).save(run / "circuit.json")
    assert write_report(run).stat().st_size < 1_500_000


# What it says --------------------------------------------------------------------------------------------------------


def read_headline(run: Path) -> str:
    folder = read_folder(run)
    return _plain(str(headline(folder)) + " " + " ".join(str(remark.text) for remark in remarks(folder)))


def kinds(run: Path, *named: str) -> list[str]:
    """The kinds of the remarks that name all of these, with ordinary spaces."""
    return [
        remark.kind
        for remark in remarks(read_folder(run))
        if all(name in _plain(str(remark.text)) for name in named)
    ]


def _plain(text: str) -> str:
    return re.sub(r"<[^>]+>", "", html.unescape(text)).replace("\u202f", " ").replace("\u00a0", " ")


def test_the_headline_has_figures_and_intervals(run: Path) -> None:
    words = read_headline(run)
    first, last = (
        Results.load(run / "results.json").find("toxicity.mean", variant)
        for variant in ("original", "ablated")
    )
    random = Results.load(run / "results.json").find("toxicity.mean", "random@40")
    figures = [_plain(format_with_interval(m)) for m in (first, last, random)]
    named = ("40 of 2,048 neurons", "mean toxicity", *figures[:2], "40 random neurons", figures[2])
    assert re.search(".*".join(map(re.escape, named)), words)
    assert kinds(run, "\u221273.6 points", "n = 200") == ["good"]
    assert kinds(run, "40 random neurons", "\u221272.1 points") == ["good"]
    assert kinds(run, "Perplexity", "+0.80 %", "+0.023") == ["good"]
    assert kinds(run, "gradient", "51.4 %") == ["good"]


def save_with_changes(run: Path, measurements: list[Measurement], differences: list[Difference]) -> None:
    found = Results.load(run / "results.json")
    names = {(m.metric, m.variant) for m in measurements}
    kept = tuple(m for m in found if (m.metric, m.variant) not in names)
    Results((*kept, *measurements), tuple(differences), found.provenance).save(run / "results.json")


def test_an_interval_with_zero_in_it_is_no_effect(run: Path) -> None:
    save_with_changes(
        run, [], [Difference("toxicity.mean", "original", "ablated", -0.01, -0.01, (-0.03, 0.01), 0.4)]
    )
    assert judge_change(read_folder(run).difference("toxicity.mean"), "lower") == "none"
    assert kinds(run, "\u22121.0 points", "p = 0.40") == ["careful"]


def test_a_change_for_the_worse_is_called_so(run: Path) -> None:
    save_with_changes(
        run, [], [Difference("toxicity.mean", "original", "ablated", 0.1, 0.1, (0.05, 0.15), 0.001)]
    )
    assert judge_change(read_folder(run).difference("toxicity.mean"), "lower") == "harmful"
    assert kinds(run, "+10.0 points", "lower is better") == ["careful"]


def test_a_method_that_is_ahead_is_named_with_its_price(run: Path) -> None:
    save_with_changes(run, [measurement("toxicity.mean", "wanda@40", 0.05, 0.01)], [])
    assert kinds(run, "Wanda", "5.0 % [4.0, 6.0] (perplexity 3.283, +16.0 %)", "23.4 %") == ["careful"]


def test_a_method_that_is_barely_ahead_is_called_close(run: Path) -> None:
    save_with_changes(run, [measurement("toxicity.mean", "wanda@40", 0.23, 0.01)], [])
    assert kinds(run, "Wanda", "23.0 % [22.0, 24.0] (perplexity 3.283", "slightly") == ["careful"]


def test_random_units_that_do_the_same_are_named(run: Path) -> None:
    save_with_changes(run, [measurement("toxicity.mean", "random@40", 0.24, 0.03)], [])
    assert kinds(run, "40 random neurons", "24.0 %", "23.4 %") == ["careful"]
    save_with_changes(
        run, [], [Difference("toxicity.mean", "random@40", "ablated", -0.01, -0.05, (-0.03, 0.01), 0.3)]
    )
    assert kinds(run, "40 random neurons", "\u22121.0 points", "p = 0.30") == ["careful"]


def test_failures_are_told(run: Path) -> None:
    assert kinds(run, "1 for mean toxicity of this circuit") == ["careful"]


@pytest.mark.parametrize(
    ("value", "metric", "written"),
    [
        (0.97, "toxicity.mean", "97.0\u202f%"),
        (2.834, "perplexity", "2.834"),
        (12345.6, "perplexity", "12,346"),
        (-1.5, "ioi.logit_difference", "\u22121.50"),
        (None, "x", "–"),
    ],
)
def test_figures_as_written(value: float | None, metric: str, written: str) -> None:
    assert figure(value, metric) == written


def test_changes_as_written() -> None:
    assert change(Difference("toxicity.mean", "a", "b", -0.25, None, None, None)) == "\u221225.0 points"
    assert format_p(1 / 2001) == "p = 0.0005"  # the least that the permutation test can give
    assert format_p(0.23) == "p = 0.23"
    assert format_p(None) == ""


# Effect against damage -----------------------------------------------------------------------------------------------


def test_every_point_of_the_trade_off_is_one_measured(run: Path) -> None:
    folder = read_folder(run)
    on_test, searched, *_ = tradeoffs(folder)
    assert len(on_test.tips) == 4 * 6
    wanda = on_test.tips["perplexity~wanda@40"]
    rows = {name: text for name, text, _ in wanda.rows}
    assert wanda.head == "Wanda, 40 neurons"
    assert rows["mean toxicity"] == format_with_interval(folder.results.find("toxicity.mean", "wanda@40"))
    assert rows["perplexity"] == "+16.0\u202f%"
    # seven of eight candidates: one was hopeless; and two counts of another method
    assert len(searched.tips) == 7 + 2
    assert re.match(r"8 candidates .*\b50 prompts .*\b60 texts .*\b6 .*\b1 ", searched.note)
    kept = {tip.head: tip.rows[-1][1] for tip in searched.tips.values()}
    assert kept["40 neurons, target completion:1, signed, matched contrast"] == "kept"
    assert kept["600 neurons, target completion:1, signed, matched contrast"] == "exceeded"
    assert kept["160 neurons, Wanda"] == "exceeded"


def test_a_search_that_is_not_this_runs_is_not_shown(run: Path) -> None:
    (run / "tune.json").unlink()
    write_json(run / "tune.json", {"format": "sparc3.tune/1", "best": {"count": 1}, "trials": {}})
    search = read_folder(run).search
    assert search is not None
    assert search.best.count == 40
    (run / "tune.json").unlink()
    kept = Results.load(run / "results.json")
    kept.provenance["tune"]["original"] = {}
    kept.save(run / "results.json")
    with pytest.raises(DamagedFile, match=r"results\.json: .*search"):
        read_folder(run)


def test_where_the_method_is_not_ahead_it_says_so(run: Path) -> None:
    assert kinds(run, "budget", "1.0 % perplexity", "Wanda (40) 85.2 %", "23.4 %") == ["good"]
    save_with_changes(run, [measurement("toxicity.mean", "wanda@40", 0.05, 0.01)], [])
    assert kinds(run, "budget", "1.0 % perplexity", "Wanda (40) 5.0 %", "23.4 %") == ["careful"]
    drop_search(run)
    assert kinds(run, "damage", "+0.80 %", "gradient (10) 76.3 %") == ["good"]
    save_with_changes(run, [measurement("toxicity.mean", "gradient@10", 0.05, 0.01)], [])
    assert kinds(run, "damage", "+0.80 %", "gradient (10) 5.0 %") == ["careful"]


def drop_search(run: Path) -> None:
    (run / "tune.json").unlink()
    found = Results.load(run / "results.json")
    Results(
        found.measurements, found.differences, {k: v for k, v in found.provenance.items() if k != "tune"}
    ).save(run / "results.json")


def test_how_sure_it_is(run: Path) -> None:
    text = _plain(page(run).text)
    for named in (
        "\u221273.6 points",
        "\u221272.1 points",
        "200 prompts",
        "3.1 points",
        "correlation 0.713",
        "toxic from 0.5",
        "87.4 %",
        "30.1 % [27.0, 33.0]",
    ):
        assert named in text


def test_an_interval_without_zero_is_not_enough(run: Path) -> None:
    save_with_changes(
        run, [], [Difference("toxicity.mean", "original", "ablated", -0.05, -0.05, (-0.1, -0.01), 0.06)]
    )
    assert judge_change(read_folder(run).difference("toxicity.mean"), "lower") == "weak"
    assert kinds(run, "\u22125.0 points", "p = 0.060", "n = 200") == ["careful"]


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [(0.2, "plain", "broken"), (-0.2, "plain", "loops"), (0.001, "good", "1.806")],
)
def test_fluency_is_told_either_way(run: Path, change: float, kind: str, named: str) -> None:
    save_with_changes(
        run,
        [],
        [
            Difference(
                "fluency", "original", "ablated", change, change / 1.8, (change - 0.01, change + 0.01), 0.001
            )
        ],
    )
    assert kinds(run, "1.800 → 2.110 [2.090, 2.130]", named) == [kind]


def test_what_circuits_share_and_what_is_protected(run: Path) -> None:
    folder = read_folder(run)
    assert [(one.name, one.both, one.expected) for one in list_shared(folder)] == [
        ("gradient", "11 (27.5\u202f%)", "1")
    ]
    assert list_protected(folder) == [("layer 2, up_proj, neuron 7", "12.50")]
    assert "layer 2, up_proj, neuron 7 (× 12.50)" in page(run).text


def test_methods_as_their_papers_write_them() -> None:
    assert [
        method_title(name) for name in ("cp-lrp", "lrp-mean_abs", "aura", "wanda-sequential", "of-mine")
    ] == ["CP-LRP", "LRP (mean abs)", "AurA", "Wanda (sequential)", "of-mine"]


def test_a_soft_scale_is_even_around_zero_and_logarithmic_far_out() -> None:
    scale = Scale(-1, 1000, 0, 100, soft=1)
    steps = [scale(b) - scale(a) for a, b in ((0, 0.1), (0.1, 0.2), (10, 100), (100, 1000))]
    assert steps[0] == pytest.approx(steps[1], rel=0.02)
    assert steps[2] == pytest.approx(steps[3], rel=0.01)
    assert scale.ticks() == [-1, 0, 1, 10, 100, 1000]


def test_tokens_are_as_dark_as_they_are_relevant(run: Path) -> None:
    folder = read_folder(run)
    short, long = heat_maps(folder, Mask(("fool",)))
    assert [class_ for _, class_, _ in short.tokens] == ["p1", "n3", "p5", "p2", ""]
    assert [value for *_, value in short.tokens][:3] == ["+0.100", "\u22121.00", "+2.00"]
    assert (short.y, short.share, short.left_out) == ("1.70", "1.60", 0)
    # the word that the lexicon has is hidden though it is two tokens
    hidden = ["veil" in str(text) for text, *_ in short.tokens]
    assert hidden == [False, False, False, True, True]
    assert (len(long.tokens), long.left_out, str(long.against)) == (160, 40, " y")
    # without a lexicon, what the model was to write is hidden whole, and the prompt is not
    unknown, _ = heat_maps(folder, Mask())
    assert ["veil" in str(text) for text, *_ in unknown.tokens] == [False, False, False, True, True]
    assert "veil" in str(unknown.targets)


def test_texts_of_every_method_stand_side_by_side(run: Path) -> None:
    folder = read_folder(run)
    toxicity, repetition = texts_by_kind(folder, Mask())
    rows = toxicity.by_method
    assert len(rows) == 6
    assert [(name, colour) for name, colour, _ in rows[0].sides] == [
        ("original", "m-original"),
        ("this circuit", "m0"),
        ("gradient, 40 neurons", "m2"),
        ("random, 40 neurons", "mr"),
    ]
    scores = [side.score for *_, side in rows[0].sides]
    assert scores == ["97.0\u202f%", "2.0\u202f%", "2.0\u202f%", "97.0\u202f%"]
    assert len(repetition.by_method) == 1
    for name in ("gradient@40", "random@40.0"):
        (run / "evaluation" / f"{name}.json").unlink()
    assert texts_by_kind(read_folder(run), Mask())[0].by_method == []


def test_a_chat_is_shown_turn_by_turn(run: Path) -> None:
    turns = (
        ("system", "Be brief."),
        ("user", f"Say\n**fool** {SCRIPT}"),
        ("assistant", "No."),
        ("user", "用户"),
    )
    ReferenceSet((Sample(turns=turns),)).save(run / "samples" / "evaluation-toxicity.jsonl")
    # WikiText's rows are empty where it has an empty line.
    ReferenceSet((Sample(""), Sample("= A title ="))).save(run / "samples" / "evaluation-perplexity.jsonl")
    for name in ("original", "ablated", "gradient@40", "random@40.0"):
        path = run / "evaluation" / f"{name}.json"
        content = json.loads(path.read_text())
        content["texts"]["toxicity"][0]["prompt"] = show(turns)
        del content["sha256"]
        write_json(path, content)
    toxicity, _ = texts_by_kind(read_folder(run), Mask(("fool",)))
    for prompt in (toxicity.pairs[0].prompt, toxicity.by_method[0].prompt):
        assert re.findall(r'class="role">(\w+)', prompt) == ["system", "user", "assistant", "user"]
        assert "user: " not in prompt
        assert "veil" in prompt
        assert SCRIPT not in prompt
    assert "role" not in toxicity.pairs[1].prompt  # a plain prompt
    assert page(run).unbalanced == []


def test_a_list_of_words_is_named_where_it_says_what_is_toxic(run: Path) -> None:
    assert word_list(read_folder(run)) == ""
    content = json.loads((run / "results.json").read_text())
    content["provenance"]["metrics"] = {"toxicity": {"scorer": "lexicon:~/lists/refusals.txt"}}
    del content["sha256"]
    write_json(run / "results.json", content)
    assert page(run).text.count("refusals.txt") >= 2


def test_the_trade_off_has_the_intervals(run: Path) -> None:
    paired = Difference("perplexity", "original", "wanda@40", 0.4, 0.14, (0.2, 0.6), 0.001)
    plain = str(tradeoffs(read_folder(run))[0].drawing).count("whisker")
    assert plain == 24  # one along the effect for every variant
    save_with_changes(run, [], [paired])
    assert str(tradeoffs(read_folder(run))[0].drawing).count("whisker") == 25


# What cannot happen --------------------------------------------------------------------------------------------------


def test_no_text_of_a_model_becomes_markup(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    read = Page(source)
    assert "alert(1)" in read.text
    assert "alert(2)" in read.text
    assert [tag for tag, _ in read.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in read.tags}
    assert not [
        name for _, attributes in read.tags for name in attributes if name.startswith("on") or name == "style"
    ]
    assert SCRIPT not in source
    assert BREAKOUT not in source


def test_control_characters_are_seen_and_do_nothing(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", source)
    assert r"\x1b[31mred\x1b[0m \x00 \u202egnp.exe \x9b2J" in source
    assert visible("a\ud800b\tc\n") == "a\\ud800b\tc\n"


def test_the_page_names_no_place_to_load_from(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    read = Page(source)
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "poster", "data"):
            assert not str(attributes.get(name) or "").startswith(("http", "//")) or tag == "a"
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'" in html.unescape(source)


def test_hostile_names_and_metrics(tmp_path: Path) -> None:
    variants = ("original", "ablated", f"{SCRIPT}@3", f"{SCRIPT}@30")
    rows = tuple(
        measurement(metric, variant, 1.0, 0.1) for metric in (BREAKOUT, "a@b") for variant in variants
    )
    provenance = {"recipe": SCRIPT, "model": {"id": BREAKOUT}, "stages": [{"name": SCRIPT, "seconds": 1}]}
    Results(rows, (), provenance).save(tmp_path / "results.json")
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert SCRIPT not in source
    assert "<img" not in source
    assert not Page(source).unbalanced


def test_offensive_words_are_dotted_until_asked_for() -> None:
    mask = Mask(("fool", "idiot"))
    assert (
        mask.write("Fools!", mask.spans("Fools!"))
        == '<span class="veil">F••••</span><span class="bare">Fools</span>!'
    )
    assert mask.spans("foolish") == []
    assert mask.hide_token(" foo", True) == [(0, 4)]
    assert mask.hide_token(" the", True) == []


def test_without_a_lexicon_a_toxic_continuation_is_hidden_whole() -> None:
    mask = Mask()
    assert mask.hide_continuation("bad words", 0.5, True) == [(0, 9)]
    assert mask.hide_continuation("good", 0.49, True) == []
    assert mask.hide_continuation("bad words", 0.9, False) == []
    assert '<span class="veil blurred">xxx xxxxx</span><span class="bare">bad words</span>' in mask.write(
        "bad words", [(0, 9)]
    )


def test_the_difference_is_marked_word_by_word() -> None:
    assert find_changes("You silly fool!", "You kind one!") == ([(4, 14)], [(4, 12)])


def test_scales_and_labels() -> None:
    assert Scale(0, 1, 0, 100)(0.25) == 25
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(0.0, 1.0, 0, 1).ticks() == [0, 0.25, 0.5, 0.75, 1.0]
    moved = spread([10, 11, 12], 5, 0, 20)
    assert all(b - a >= 5 for a, b in zip(moved, moved[1:], strict=False))
    assert max(moved) <= 20


def test_every_class_of_a_method_has_a_shape_and_a_colour() -> None:
    from sparc3.report import charts, read

    classes = {f"m{number}" for number in range(1, read.CLASSES + 1)}
    style = (Path(read.__file__).parent / "page.css").read_text()
    assert classes == set(charts._SHAPES)
    assert all(style.count(f"--{name}: #") == 3 and f".off-{name} .{name}" in style for name in classes)
    assert len(set(charts._SHAPES.values())) == read.CLASSES
