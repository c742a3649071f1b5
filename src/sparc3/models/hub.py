"""The Hugging Face hub: parse names, download files, and explain the client's errors."""

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
"""Remedy for a checkpoint whose weights are only available as pickle."""
PREFIX = "hf://"
_ID = r"[\w.-]+/[\w.-]+"
_REVISION = r"@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+)"
_URI = re.compile(rf"hf://(?P<type>models/|datasets/)?(?P<repo>{_ID})(?:{_REVISION})?(?:/(?P<path>.+))?")
_PLAIN = re.compile(rf"(?P<repo>{_ID})(?:{_REVISION})?")


@dataclass(frozen=True)
class Place:
    """A file in a repository on the hub, or, without a path, the repository.

    Attributes:
        type: "model" or "dataset".
        revision: a branch, a tag or a commit; None for the default branch.
    """

    repo: str
    path: str | None = None
    revision: str | None = None
    type: str = "model"


def parse_place(name: str) -> Place | None:
    """The place that `name` means on the hub, in the forms of its client: hf://USER/REPO[@REVISION][/PATH],
    hf://datasets/…, or USER/REPO[@REVISION].

    None for a path: any other name, or anything that exists locally. Raises UserError for an hf:// name of
    another form.
    """
    if name.startswith(PREFIX):
        match = _URI.fullmatch(name)
        if not match:
            raise UserError(
                f"{name} is not a place on the hub; write hf://USER/REPO/circuit.json, or "
                "hf://USER/REPO@REVISION/circuit.json"
            )
        return Place(
            match["repo"],
            match["path"],
            match["revision"],
            "dataset" if match["type"] == "datasets/" else "model",
        )
    match = _PLAIN.fullmatch(name)
    if not match or name.startswith(".") or Path(name).exists() or name.endswith((".json", ".safetensors")):
        return None
    return Place(match["repo"], None, match["revision"])


def fetch(place: Place, paths: tuple[str, ...]) -> Path:
    """A local copy of a file on the hub: the place's own path, or else the first of `paths` that the
    repository has.

    The file is downloaded once into the hub's own cache, which is also used while the hub cannot be reached.

    Raises:
        UserError: a missing or inaccessible repository, revision or file, or no local copy while the hub
            cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    offline, by_hand = not is_reachable(), "download the file elsewhere and give its path"
    candidates = (place.path,) if place.path else paths
    for path in candidates:
        with hub_errors(place.repo, "repository or file", by_hand):
            try:
                return Path(
                    hf_hub_download(
                        place.repo,
                        path,
                        repo_type=place.type,
                        revision=place.revision,
                        local_files_only=offline,
                    )
                )
            except RevisionNotFoundError:
                raise UserError(
                    f"{place.repo} has no revision '{place.revision}' on the hub; give a branch, a tag or a "
                    "commit"
                ) from None
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                # While online, this error means that the connection failed, not that the file is missing.
                if isinstance(error, LocalEntryNotFoundError) and not offline:
                    raise
    if offline:
        raise UserError(f"cannot reach the hub for '{place.repo}', and there is no local copy; {by_hand}")
    raise UserError(
        f"{place.repo} on the hub has no {' or '.join(candidates)}; name the file: {PREFIX}{place.repo}/PATH"
    )


def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The model's folder in the hub's cache, after downloading its small files if the hub can be reached;
    None if there is none.

    Args:
        patterns: patterns of the files to download, from the repository's top folder only.
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
                local_files_only=not is_reachable(),
            )
        except LocalEntryNotFoundError as error:
            # The error names the incomplete snapshot. The weights were loaded from it, so it exists.
            folder = getattr(error, "snapshot_path", None)
    return Path(folder) if folder else None


def is_reachable() -> bool:
    """Whether the hub's host name can be resolved, without waiting for timeouts."""
    try:
        require_hub("")
    except UserError:
        return False
    return True


def looks_local(name: str) -> bool:
    """Whether a model's name means a local folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


ELSEWHERE = "download it elsewhere and give the folder's path"


def require_hub(name: str, remedy: str = ELSEWHERE) -> None:
    """Raise UserError with the remedy at once, instead of after many retries, if the hub's host name
    cannot be resolved."""
    from huggingface_hub import constants

    # Behind a proxy, this machine need not be able to resolve names itself.
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
    """Inside, errors of the hub's client and of transformers become UserErrors that say what to do."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if explanation := _explain(error, name, kind, remedy):
            raise explanation from None
        raise


def _explain(error: BaseException, name: str, kind: str, remedy: str) -> UserError | None:
    from huggingface_hub import errors

    # transformers wraps the hub's errors in an OSError, so that the cause may be further down.
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    messages = "\n".join(map(str, chain))

    def has_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    status_codes = [
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
    if gated or "gated repo" in messages:
        return UserError(
            f"'{name}' is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN to a "
            "token that may read it"
        )
    if {401, 403} & set(status_codes) or has_any(errors.LocalTokenNotFoundError):
        return UserError(
            f"you have no access to '{name}' on the hub; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that has it"
        )
    first = (str(error).strip().splitlines() or [""])[0]
    if status_codes and status_codes[0] < 500:
        last = (str(error).strip().splitlines() or [""])[-1]
        return UserError(f"the hub refused the request for '{name}' (it answers {status_codes[0]}): {last}")
    if has_any(errors.LocalEntryNotFoundError, errors.HTTPError):  # type: ignore[attr-defined]
        return UserError(f"cannot reach the hub for '{name}'; {remedy}")
    if "cannot be loaded with `safetensors`" in messages:
        return UserError(f"'{name}' only has pickle weights, which sparc3 does not read; {CONVERT}")
    if "trust_remote_code" in messages:
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
    description = (
        first if first and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {first}"
    )
    return UserError(
        f"cannot load '{name}': {description.strip()}; if its files are damaged, download it again"
    )
