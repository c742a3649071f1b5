"""What is installed here, and what can be reached."""

import platform
from importlib.metadata import PackageNotFoundError, version

from ..errors import UserError
from ..hub import require_hub
from ..version import __version__

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub", "numpy")

EXTRAS = {
    "accelerate": "spreads one model over GPUs and the CPU, --device map",
    "lm_eval": "runs the language model evaluation harness",
    "bitsandbytes": "loads 4-bit and 8-bit weights",
    "torchao": "loads weights that torchao quantised",
}
"""Packages that sparc3 works without → what each adds."""


def environment() -> list[tuple[str, str]]:
    """(what, how it stands): versions, GPUs, the hub, optional packages. Needs nothing and fails at nothing."""
    rows = [("sparc3", __version__), ("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    rows += [(name, _version(name) or "not installed") for name in NEEDED]
    rows += [("CUDA", _cuda()), ("hub", _hub())]
    return rows + [(name, _version(name) or f"not installed: {adds}") for name, adds in EXTRAS.items()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU that PyTorch can use; everything runs on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _hub() -> str:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "switched off by HF_HUB_OFFLINE; folders, the local cache and the demo work"
    try:
        require_hub("")
        get_session().head(constants.ENDPOINT, timeout=5)
    except UserError:
        return f"no address for {constants.ENDPOINT}; folders, the local cache and the demo work"
    except Exception as error:  # whatever the client raises, the answer is the same
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}); folders, the local cache and the demo work"
    return f"{constants.ENDPOINT} answers"
