"""The Hugging Face hub: which names mean it, what its client's errors mean, and one file of a repository."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    away, by_hand = not reachable(), "download the file elsewhere and give its path"
    wanted = (place.path,) if place.path else paths
    for path in wanted:
        with hub_errors(place.repo, "repository or file", by_hand):
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
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                if isinstance(error, LocalEntryNotFoundError) and not away:
                    raise
    if away:
        raise UserError(f"cannot reach the hub for '{place.repo}', and there is no local copy; {by_hand}")
    raise UserError(
        f"{place.repo} on the hub has no {' or '.join(wanted)}; name the file: {PREFIX}{place.repo}/PATH"
    )


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


ELSEWHERE = "download it elsewhere and give the folder's path"


def require_hub(name: str, remedy: str = ELSEWHERE) -> None:
    """Fail at once, naming the remedy, where the hub's host has no address, not after many retries."""
    from huggingface_hub import constants

    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError
        if not any(os.environ.get(proxy) for proxy in proxies):
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname or "", 443)
    except OSError:
        raise UserError(f"cannot reach the hub for '{name}'; {remedy}") from None


@contextmanager
def hub_errors(name: str, kind: str = "model", remedy: str = ELSEWHERE) -> Iterator[None]:
    """Turns what the hub's client and transformers raise inside into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if told := _explain(error, name, kind, remedy):
            raise told from None
        raise


def _explain(error: BaseException, name: str, kind: str, remedy: str) -> UserError | None:
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    said = "\n".join(map(str, chain))

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    answers = [
        e.response.status_code
        for e in chain
        if isinstance(e, errors.HfHubHTTPError) and getattr(e, "response", None) is not None
    ]
    gated = [
        isinstance(e, errors.GatedRepoError) for e in chain if isinstance(e, errors.RepositoryNotFoundError)
    ]
    if not all(gated):
        return UserError(
            f"the hub has no {kind} '{name}', or you have no access to it; check the name, or log in with "
            "`hf auth login`"
        )
    if gated or "gated repo" in said:
        return UserError(
            f"'{name}' is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN to a "
            "token that may read it"
        )
    if {401, 403} & set(answers) or met(errors.LocalTokenNotFoundError):
        return UserError(
            f"you have no access to '{name}' on the hub; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that has it"
        )
    first = (str(error).strip().splitlines() or [""])[0]
    if answers and answers[0] < 500:
        last = (str(error).strip().splitlines() or [""])[-1]
        return UserError(f"the hub refused the request for '{name}' (it answers {answers[0]}): {last}")
    if met(errors.LocalEntryNotFoundError, errors.HTTPError):  # type: ignore[attr-defined]
        return UserError(f"cannot reach the hub for '{name}'; {remedy}")
    if "cannot be loaded with `safetensors`" in said:
        return UserError(f"'{name}' only has pickle weights, which sparc3 does not read; {CONVERT}")
    if "trust_remote_code" in said:
        return UnsupportedModel(
            f"'{name}' needs Python code from its own repository, which sparc3 does not run"
        )
    if isinstance(error, ImportError):  # of a quantised model; transformers names what to install
        return UserError(f"'{name}' needs a package that is not installed: {' '.join(str(error).split())}")
    # A damaged file can raise anything, and a panic of the tokenizers' Rust is not even an Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return None
    if isinstance(error, errors.StrictDataclassError) and error.__cause__:
        first = (str(error.__cause__).strip().splitlines() or [""])[0]
    what = first if first and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {first}"
    return UserError(f"cannot load '{name}': {what.strip()}; if its files are damaged, download it again")
