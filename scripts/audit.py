"""Known vulnerabilities of everything that constraints.txt pins, by pip-audit.

    pip install pip-audit==2.10.1
    python scripts/audit.py [constraints.txt]

pip-audit reads the page of each release, and leaves out, with exit code 0, a package whose release has none,
as on mirrors that serve the projects' pages alone. Such a page tells of the project's newest release: here it
does for a pin that is the newest, and every other package is named as not audited. Exit code 1 with a
vulnerability, 3 where something could not be audited.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from pip_audit._service.interface import ResolvedDependency, VulnerabilityResult
from pip_audit._service.pypi import PyPIService


def service() -> PyPIService:
    """pip-audit's, falling back to the project's page where the release has none and is the newest."""
    made = PyPIService()
    plain = made.session.get

    def get(url: str, **options: Any) -> Any:
        answer = plain(url=url, **options)
        if answer.status_code != 404:
            return answer
        project, version = url.removesuffix("/json").rsplit("/", 1)
        newest = plain(url=f"{project}/json", **options)
        return newest if newest.ok and newest.json()["info"]["version"] == version else answer

    made.session.get = get
    return made


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "constraints.txt"
    pins = [
        Requirement(line)
        for line in path.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    asked = [ResolvedDependency(pin.name, Version(str(pin.specifier).removeprefix("=="))) for pin in pins]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(service().query, asked))
    skipped = [one for one, _ in answers if one.is_skipped()]
    vulnerable: list[tuple[ResolvedDependency, list[VulnerabilityResult]]] = [
        (one, found) for one, found in answers if found
    ]
    for one, found in vulnerable:
        for each in found:
            fixed = ", ".join(map(str, each.fix_versions)) or "no release"
            print(f"{one.name}=={one.version}: {each.id} {' '.join(sorted(each.aliases))}, fixed in {fixed}")
    for one in skipped:
        print(f"not audited: {one.name}")
    print(
        f"{len(pins)} packages: {len(pins) - len(skipped)} audited, {len(vulnerable)} of them vulnerable, "
        f"{len(skipped)} not audited"
    )
    return 1 if vulnerable else 3 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
