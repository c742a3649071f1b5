"""The Hugging Face hub: which names mean it, what its client's errors mean, and one file of a repository."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from ..errors import UnsupportedModel, UserError

CONVERT = "convert them: load it with transformers where you trust it, and save_pretrained writes safetensors"
"""What to do about a checkpoint that holds its weights as pickle alone."""
PREFIX = "hf://"
_ID = r"[\w.-]+/[\w.-]+"
_REVISION = r"@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+)"
_URI = re.compile(rf"hf://(?P<type>models/|datasets/)?(?P<repo>{_ID})(?:{_REVISION})?(?:/(?P<path>.+))?")
_PLAIN = re.compile(rf"(?P<repo>{_ID})(?:{_REVISION})?")


@dataclass(frozen=True)
class Place:
    """A file of a repository on the hub, or, without a path, the repository.

    Attributes:
        type: "model" or "dataset".
        revision: a branch, a tag or a commit; None for the default branch.
    """

    repo: str
    path: str | None = None
    revision: str | None = None
    type: str = "model"


def place_of(name: str) -> Place | None:
    """What `name` means on the hub, written as its client writes it: hf://USER/REPO[@REVISION][/PATH],
    hf://datasets/…, or USER/REPO[@REVISION].

    None for a path: anything else, and whatever exists here. Raises UserError for an hf:// name that is none
    of these.
    """
    if name.startswith(PREFIX):
        found = _URI.fullmatch(name)
        if not found:
            raise UserError(
                f"{name} is not a place on the hub; write hf://USER/REPO/circuit.json, or "
                "hf://USER/REPO@REVISION/circuit.json"
            )
        return Place(
            found["repo"],
            found["path"],
            found["revision"],
            "dataset" if found["type"] == "datasets/" else "model",
        )
    found = _PLAIN.fullmatch(name)
    if not found or name.startswith(".") or Path(name).exists() or name.endswith((".json", ".safetensors")):
        return None
    return Place(found["repo"], None, found["revision"])


def fetch(place: Place, paths: tuple[str, ...]) -> Path:
    """The local copy of a file of the hub: of the place's own path, else of the first of `paths` that the
    repository has.

    Downloaded once and kept in the hub's own cache, which is also what is read where the hub cannot be
    reached.

    Raises:
        UserError: no such repository, revision or file, no access to it, or neither the hub nor a copy within
            reach.
    """
    away = not reachable()
    wanted = (place.path,) if place.path else paths
    for path in wanted:
        found = _download(place, path, away)
        if found:
            return found
    if away:
        raise UserError(f"cannot reach the hub for '{place.repo}', and there is no local copy; {_BY_HAND}")
    raise UserError(
        f"{place.repo} on the hub has no {' or '.join(wanted)}; name the file: {PREFIX}{place.repo}/PATH"
    )


_BY_HAND = "download the file elsewhere and give its path"


def _download(place: Place, path: str, away: bool) -> Path | None:
    """The file's local copy; None if the repository (offline: the cache) does not have it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    with hub_errors(place.repo, "repository or file", _BY_HAND):
        try:
            return Path(
                hf_hub_download(
                    place.repo, path, repo_type=place.type, revision=place.revision, local_files_only=away
                )
            )
        except RevisionNotFoundError:
            raise UserError(
                f"{place.repo} has no revision '{place.revision}' on the hub; give a branch, a tag or a "
                "commit"
            ) from None
        except LocalEntryNotFoundError:
            if not away:
                raise
        except EntryNotFoundError:
            pass
    return None


def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder that the hub's cache keeps a model in, with its small files downloaded too where the hub can
    be reached; None where there is none.

    Args:
        patterns: which files to see to; of the repository's own folder only.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder: str | None
    with hub_errors(repo):
        try:
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=not reachable(),
            )
        except LocalEntryNotFoundError as error:
            # It names a snapshot that is not complete. The weights were loaded from it, so it exists.
            folder = getattr(error, "snapshot_path", None)
    return Path(folder) if folder else None


def reachable() -> bool:
    """Whether the hub's host has an address, told at once."""
    try:
        require_hub("")
    except UserError:
        return False
    return True


def looks_local(name: str) -> bool:
    """Whether the name of a model means a folder here."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def require_hub(name: str, remedy: str = "download it elsewhere and give the folder's path") -> None:
    """Fail at once, naming the remedy, where the hub's host has no address, instead of after half a minute of
    retries."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or ""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError
        if not any(
            os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        ):
            socket.getaddrinfo(host, 443)
    except OSError:
        raise UserError(f"cannot reach the hub for '{name}'; {remedy}") from None


class hub_errors:  # noqa: N801  a context manager, used like a function
    """Turns what the hub's client raises into one line that says what to do."""

    def __init__(
        self, name: str, kind: str = "model", remedy: str = "download it elsewhere and give the folder's path"
    ) -> None:
        self.name, self.kind, self.remedy = name, kind, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
            StrictDataclassError,
        )
        from huggingface_hub.errors import HTTPError as HTTPError  # type: ignore[attr-defined]

        chain = _chain(error)
        name = self.name
        refused = [
            e.response.status_code
            for e in chain
            if isinstance(e, HfHubHTTPError) and getattr(e, "response", None) is not None
        ]
        missing = any(
            isinstance(e, RepositoryNotFoundError) and not isinstance(e, GatedRepoError) for e in chain
        )
        if not missing and any(isinstance(e, GatedRepoError) or "gated repo" in str(e) for e in chain):
            raise UserError(
                f"'{name}' is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN "
                "to a token that may read it"
            ) from None
        if missing:
            raise UserError(
                f"the hub has no {self.kind} '{name}', or you have no access to it; check the name, or log "
                "in with `hf auth login`"
            ) from None
        if {401, 403} & set(refused) or any(isinstance(e, LocalTokenNotFoundError) for e in chain):
            raise UserError(
                f"you have no access to '{name}' on the hub; log in with `hf auth login`, or set HF_TOKEN to "
                "a token that has it"
            ) from None
        if refused and refused[0] < 500:
            raise UserError(
                f"the hub refused the request for '{name}' (it answers {refused[0]}): "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None
        if any(isinstance(e, (LocalEntryNotFoundError, HTTPError)) for e in chain):
            raise UserError(f"cannot reach the hub for '{name}'; {self.remedy}") from None
        if any("cannot be loaded with `safetensors`" in str(e) for e in chain):
            raise UserError(
                f"'{name}' only has pickle weights, which sparc3 does not read; {CONVERT}"
            ) from None
        if any("trust_remote_code" in str(e) for e in chain):
            raise UnsupportedModel(
                f"'{name}' needs Python code from its own repository, which sparc3 does not run"
            ) from None
        if isinstance(error, ImportError):  # of a quantised model; transformers names what to install
            raise UserError(
                f"'{name}' needs a package that is not installed: {' '.join(str(error).split())}"
            ) from None
        # A damaged file can raise anything, and a panic of the tokenizers' Rust is not even an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
            first = (str(told).strip().splitlines() or [""])[0]
            what = (
                first
                if first and isinstance(error, (OSError, ValueError))
                else f"{type(error).__name__} {first}"
            )
            raise UserError(
                f"cannot load '{name}': {what.strip()}; if its files are damaged, download it again"
            ) from None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain
