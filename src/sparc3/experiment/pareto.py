"""The Pareto front of points where less is better."""

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float] | None]) -> set[int]:
    """Places of the points that no other point matches in both coordinates and betters in one; None is no point."""
    there = [(index, point) for index, point in enumerate(points) if point is not None]
    return {
        index
        for index, (x, y) in there
        if not any(a <= x and b <= y and (a, b) != (x, y) for _, (a, b) in there)
    }
