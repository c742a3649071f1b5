"""Promises that no single function can keep: who imports whom, what the front door offers, what importing costs."""

import ast
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import sparc3

SOURCE = Path(sparc3.__file__).parent
LAYERS = [
    {"safe_text", "errors", "storage", "distributed", "progress", "settings"},
    {"demo", "models", "samples", "scores", "results", "verdict"},
    {"circuits", "attribution", "evaluation"},
    {"report", "checkpoints", "doctor"},
    {"recipe"},
    {"experiment"},
    {"plan"},
    {"cli"},
    {"__main__"},
]
"""Each layer may import from those above it in this list, never the other way; verbs do not import each other."""


def _layer(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def _imports(path: Path) -> set[str]:
    """First names, inside sparc3, of everything a file imports; imports for type checkers alone do not count."""
    found = set()
    depth = len(path.relative_to(SOURCE).parts)
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node not in skipped:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom | ast.Import) and node not in skipped:
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any(name.startswith("sparc3") for name in names), f"{path}: import sparc3 relatively"
    return found


def test_imports_point_one_way() -> None:
    for path in SOURCE.rglob("*.py"):
        home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        for name in _imports(path) - {home, "__version__"}:
            same_noun_level = _layer(name) == _layer(home) and _layer(home) < 2
            assert _layer(name) < _layer(home) or same_noun_level, (
                f"{path.relative_to(SOURCE)} imports {name}"
            )


def test_nothing_dangerous_is_in_the_code() -> None:
    bad = re.compile(
        r"\bimport pickle\b|torch\.load\(|(?<![\w.])(?:eval|exec)\(|trust_remote_code=True|yaml\.(?:unsafe_|full_)?load\(|yaml\.Unsafe|yaml\.FullLoader"
    )
    for path in SOURCE.rglob("*.py"):
        assert not bad.search(path.read_text()), path


def test_the_front_door_is_what_it_says() -> None:
    for name in sparc3.__all__:
        assert getattr(sparc3, name) is not None
        home = getattr(getattr(sparc3, name), "__doc__", None)
        assert name == "__version__" or home, f"{name} has no docstring"
    assert sorted(sparc3.__all__) == dir(sparc3)
    contract = {
        "load_model",
        "attribute",
        "contrast",
        "select",
        "ablated",
        "ablate_",
        "evaluate",
        "run",
        "Scores",
        "Circuit",
        "Results",
    }
    assert contract <= set(sparc3.__all__)


def test_importing_does_nothing_and_help_is_quick() -> None:
    code = "import sys, sparc3, sparc3.cli.main; print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
    began = time.perf_counter()
    helped = subprocess.run(
        [sys.executable, "-m", "sparc3", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - began < 2
    for command in (
        "demo",
        "run",
        "attribute",
        "select",
        "ablate",
        "evaluate",
        "report",
        "recipes",
        "doctor",
    ):
        assert command in helped.stdout


def test_a_recipe_loads_before_anything_else_does() -> None:
    """Each metric registers itself when its module is imported, which reading a recipe must do by itself."""
    code = "import sparc3; print(sorted(sparc3.load_recipe('demo').metrics()))"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read.stdout.strip() == "['ioi', 'perplexity', 'toxicity']"


def test_imports_inside_strings_and_notebooks_exist() -> None:
    """Code that other processes run stands in strings, notebooks and pages, where no type checker looks."""
    root = SOURCE.parents[1]
    files = [path for folder in ("tests", "benchmarks", "scripts") for path in (root / folder).rglob("*.*")]
    files += [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".sh", ".md", ".ipynb")}
    assert len(texts) > 50
    for path, text in texts.items():
        for module, names in re.findall(r"from (sparc3(?:\.\w+)+) import ([\w, ]+)", text):
            home = importlib.import_module(module)
            for name in (part.split(" as ")[0].strip() for part in names.split(",") if part.strip()):
                assert hasattr(home, name) or importlib.util.find_spec(f"{module}.{name}"), (
                    path,
                    module,
                    name,
                )
        for module in re.findall(r"\bimport (sparc3(?:\.\w+)+)", text):
            assert importlib.util.find_spec(module), (path, module)
