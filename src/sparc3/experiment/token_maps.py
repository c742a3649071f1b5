"""Token maps: which tokens of undesired samples made their targets likely (`sparc3.tokens/1`,
tokens.json)."""

import logging
from typing import Any

from .. import __version__, distributed
from ..attribution.token_relevance import attribute_tokens
from ..errors import NonFinite
from ..samples.reference_set import ReferenceSet
from ..storage import fingerprint, write_json
from .run_folder import RunContext, read_made
from .score import ScoringSpec
from .work_list import TOKEN_MAPS, has_token_maps

log = logging.getLogger("sparc3")
FORMAT = "sparc3.tokens/1"


def write_token_maps(work: RunContext, how: ScoringSpec) -> None:
    """Write tokens.json, of the first undesired samples and the circuit's own method and target, unless the
    one there was made from the same; nothing for a method without relevance."""
    if not has_token_maps(work.recipe):
        return
    samples = ReferenceSet.of(list(work.references["undesired"])[:TOKEN_MAPS])
    options: dict[str, Any] = {
        "method": how.options.method,
        "target": how.targets["undesired"],
        "truncate": how.options.truncate,
        **{name: own for name in ("epsilon", "words") if (own := getattr(how.options, name))},
    }
    asked = {**options, "samples": samples.fingerprint, "model": work.fingerprint, "version": __version__}
    made_from = fingerprint(asked)
    if read_made(work, "tokens.json", FORMAT, made_from):
        work.used_again.append("tokens.json")
        return
    if distributed.is_main():
        maps = []
        for sample in samples:
            try:
                found = attribute_tokens(work.model, [sample], tokenizer=work.tokenizer, **options)
                maps += [one.to_dict() for one in found]
            except NonFinite as error:
                log.warning("token maps: %s", error)
        content = {"method": options["method"], "target": options["target"], "maps": maps}
        write_json(work.folder / "tokens.json", {"format": FORMAT, "made_from": made_from, **content})
        log.info("token maps: %d of %d samples", len(maps), len(samples))
    distributed.wait()
