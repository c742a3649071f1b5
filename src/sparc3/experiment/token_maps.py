"""Token maps: which tokens of undesired samples made their targets likely. They are saved as tokens.json
(`sparc3.tokens/1`)."""

import logging
from typing import Any

from .. import __version__, distributed
from ..attribution.token_relevance import attribute_tokens
from ..errors import NonFinite
from ..samples.reference_set import ReferenceSet
from ..storage import fingerprint, write_json
from .run_folder import RunContext, read_if_current
from .score import ScoringSpec
from .work_list import TOKEN_MAPS, has_token_maps

log = logging.getLogger("sparc3")
FORMAT = "sparc3.tokens/1"


def write_token_maps(work: RunContext, spec: ScoringSpec) -> None:
    """Write tokens.json for the first undesired samples, with the circuit's method and target, unless an
    existing one fits. Does nothing for a method without token relevance."""
    if not has_token_maps(work.recipe):
        return
    samples = ReferenceSet.of(list(work.references["undesired"])[:TOKEN_MAPS])
    options: dict[str, Any] = {
        "method": spec.options.method,
        "target": spec.targets["undesired"],
        "truncate": spec.options.truncate,
        **{name: value for name in ("epsilon", "words") if (value := getattr(spec.options, name))},
    }
    inputs = {**options, "samples": samples.fingerprint, "model": work.fingerprint, "version": __version__}
    made_from = fingerprint(inputs)
    if read_if_current(work, "tokens.json", FORMAT, made_from):
        work.reused_files.append("tokens.json")
        return
    if distributed.is_main():
        maps = []
        for sample in samples:
            try:
                maps_of_sample = attribute_tokens(work.model, [sample], tokenizer=work.tokenizer, **options)
                maps += [token_map.to_dict() for token_map in maps_of_sample]
            except NonFinite as error:
                log.warning("token maps: %s", error)
        content = {"method": options["method"], "target": options["target"], "maps": maps}
        write_json(work.folder / "tokens.json", {"format": FORMAT, "made_from": made_from, **content})
        log.info("token maps: %d of %d samples", len(maps), len(samples))
    distributed.wait()
