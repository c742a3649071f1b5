"""Handing a circuit, or a checkpoint without one, to others: onto the hub, in one commit."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..circuits.circuit import Circuit
from ..errors import UserError
from ..models.hub import hub_errors, require_hub
from ..results import Results
from .model_card import circuit_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    results: Results | None = None,
    message: str | None = None,
) -> str:
    """Upload a circuit's file, or a folder that `export` wrote, to a model repository of the hub, as one commit.

    The repository is made, private, where it is not there yet. The token is the one of `hf auth login`, or HF_TOKEN. A circuit's file is
    called circuit.json there (circuit.safetensors for weights), so that "USER/REPO" is all that others need; it gets a card where the
    repository has none.

    Args:
        repo: "USER/REPO".
        public: make the repository public; needed too for one that is public already, so that nothing is shown to all by oversight.
        base: hub id of the model that a circuit belongs to, for its card; not looked at for a folder, whose card names it.
        results: measurements for a circuit's card.

    Returns:
        The repository's address.

    Raises:
        UserError: neither a circuit's file nor such a folder; no token, or one without the right to write there; or the hub is out of reach.
    """
    from huggingface_hub import HfApi, get_token

    source = Path(path)
    if not source.exists():
        raise UserError(
            f"no such file or folder: {path}; give a circuit's file, or a folder that sparc3 ablate wrote"
        )
    circuit = Circuit.load(source)
    if source.is_dir() and not (source / "config.json").is_file():
        raise UserError(
            f"{path} is not a checkpoint, it has no config.json; give a folder that sparc3 ablate wrote, or the circuit's file alone"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not the name of a repository; write USER/REPO")
    require_hub(repo, "push from a machine that can reach it")
    if not get_token():
        raise UserError(
            "no token of the hub is here; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    with hub_errors(repo, "user or organisation of", "try again; nothing of it is there before all of it is"):
        api = HfApi(library_name="sparc3")
        address = str(api.create_repo(repo, private=not public, exist_ok=True))
        if not public and not api.model_info(repo).private:
            raise UserError(
                f"{repo} is there already and is public; say --public if all may see this, or choose another name"
            )
        files = _of_folder(source) if source.is_dir() else {f"circuit{circuit.suffix}": source}
        card = (
            None
            if source.is_dir() or api.file_exists(repo, CARD)
            else circuit_card(circuit, repo, base=base, results=results)
        )
        _commit(
            api,
            repo,
            files,
            card,
            message
            or f"{len(circuit):,} {circuit.unit}s {'removed' if source.is_dir() else 'found'} by sparc3",
        )
    return address


def _of_folder(folder: Path) -> dict[str, Path]:
    """Path in the repository → file, without hidden ones."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _commit(api: "HfApi", repo: str, files: dict[str, Path], card: str | None, message: str) -> None:
    from huggingface_hub import CommitOperationAdd

    content: dict[str, Path | bytes] = {**files, **({CARD: card.encode()} if card else {})}
    api.create_commit(
        repo, [CommitOperationAdd(name, what) for name, what in content.items()], commit_message=message
    )
