"""Upload a circuit or an ablated checkpoint to the hub in one commit."""

import os
import re
from pathlib import Path

from ..circuits.circuit import Circuit
from ..errors import UserError
from ..models.hub import hub_errors, require_hub
from ..results import Results
from .model_card import make_circuit_card


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    results: Results | None = None,
    message: str | None = None,
) -> str:
    """Upload a circuit's file, or a folder that `export` wrote, to a model repository of the hub, in one
    commit.

    A missing repository is created, private by default. The token is that of `hf auth login`, or HF_TOKEN. A
    circuit's file is named circuit.json (circuit.safetensors for weights), so that others need only
    "USER/REPO" to load it; a repository without a card gets one.

    Args:
        repo: "USER/REPO".
        public: make the repository public; also required for an existing public one, to prevent accidents.
        base: hub id of a circuit's model, for its card; a folder already has a card that names it.
        results: measurements for a circuit's card.
        message: the commit message.

    Returns:
        The repository's address.

    Raises:
        UserError: a path of another kind, no token or one without write access, or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    source = Path(path)
    circuit = _load_source(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not a repository name; write USER/REPO")
    require_hub(repo, "push from a machine that can reach it")
    if not get_token():
        raise UserError("no hub token was found; run `hf auth login`, or set HF_TOKEN to one that may write")
    default_message = (
        f"{len(circuit):,} {circuit.unit}s {'removed' if source.is_dir() else 'found'} by sparc3"
    )
    with hub_errors(repo, "user or organisation of", "try again; an incomplete upload changes nothing"):
        api = HfApi(library_name="sparc3")
        address = str(api.create_repo(repo, private=not public, exist_ok=True))
        if not public and not api.model_info(repo).private:
            raise UserError(
                f"{repo} already exists and is public; pass --public if everyone may see this, or choose "
                "another name"
            )
        content: dict[str, Path | bytes] = {}
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                name = file.relative_to(source)
                if file.is_file() and not any(part.startswith(".") for part in name.parts):
                    content[name.as_posix()] = file
        else:
            content[f"circuit{circuit.suffix}"] = source
            if not api.file_exists(repo, "README.md"):
                content["README.md"] = make_circuit_card(circuit, repo, base=base, results=results).encode()
        operations = [CommitOperationAdd(name, file) for name, file in content.items()]
        api.create_commit(repo, operations, commit_message=message or default_message)
    return address


def _load_source(source: Path) -> Circuit:
    """The circuit in a circuit's file or an exported folder. Raises UserError for anything else, and for a
    circuit that was measured by mean ablation."""
    if not source.exists():
        raise UserError(
            f"no such file or folder: {source}; give a circuit's file, or a folder that sparc3 ablate wrote"
        )
    circuit = Circuit.load(source)
    circuit.require_exportable()
    if source.is_dir() and not (source / "config.json").is_file():
        raise UserError(
            f"{source} is not a checkpoint because it has no config.json; give a folder that sparc3 ablate "
            "wrote, or the circuit's file alone"
        )
    return circuit
