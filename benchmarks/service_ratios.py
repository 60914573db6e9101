"""What the loads of service.py come to: the fastest of ours beside the fastest Infinity, and the
marks for it.

A mark is what the project wants of a ratio. Start at `ratios`; `find_problems` is what an exit code
is made of.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_COSINE = 0.999
"""between the services' vectors of an item: they resize and round each in its own way"""
LEAST_INT8_COSINE = 0.99
OURS = "clipserve"
Loads = dict[str, dict[str, dict[str, float]]]
"""by work and number of clients, service, and what was measured"""


@dataclass(frozen=True)
class Mark:
    """The best number of ours, divided by the best of an Infinity's, in one load."""

    load: str
    number: str
    bound: float

    @property
    def is_least(self) -> bool:
        return self.number == "items_per_s"


MARKS = [
    Mark("1 picture, 32 clients", "items_per_s", 4.0),
    Mark("8 pictures, 32 clients", "items_per_s", 4.0),
    Mark("1 text, 32 clients", "items_per_s", 3.0),
    Mark("1 text, 1 clients", "p50_ms", 0.5),
    Mark("1 picture, 1 clients", "p50_ms", 0.5),
    Mark("8 pictures, 1 clients", "p50_ms", 0.5),
]
LEAST_SERVED = 0.85
"""of what is embedded in process, in the load that gets most of it"""


def ratios(loads: Loads) -> dict[str, Any]:
    """By name: the value, what it is against, the mark, and whether it is met.

    What was not measured has no value, and its mark is not met.
    """
    found = {f"{mark.number}: {mark.load}": _beside_infinity(mark, loads) for mark in MARKS}
    found |= {
        f"{mark.number}: {mark.load}, without int8": _beside_infinity(mark, loads, but="int8")
        for mark in MARKS
        if any("int8" in name for name in loads.get(mark.load, ()))
    }
    for kind in ("texts", "pictures"):
        found[f"served / in process: {kind}"] = _beside_in_process(kind, loads, LEAST_SERVED)
    found["served / towers alone: pictures"] = _beside_in_process("pictures, resized", loads, None)
    return found


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Two services' unit vectors (N, E) of the same items: the least cosine, and whether each of
    ours has its own item's as the nearest of theirs."""
    cosines = ours @ theirs.T  # (N, N)
    is_own = cosines.argmax(axis=1) == np.arange(len(ours))
    return {
        "least_cosine": round(float(cosines.diagonal().min()), 5),
        "nearest_is_own": bool(is_own.all()),
    }


def find_problems(report: dict[str, Any]) -> list[str]:
    """The marks that are not met, vectors that are not the same, and requests that failed."""
    found = [
        f"{name}: {'not measured' if row['value'] is None else row['value']}, not {row['mark']}"
        for name, row in report["ratios"].items()
        if not row["met"]
    ]
    for work, services in report["agreement"].items():
        for name, row in services.items():
            least = LEAST_INT8_COSINE if "int8" in name else LEAST_COSINE
            if not (row["least_cosine"] >= least and row["nearest_is_own"]):
                found.append(f"{work}: the vectors of {name} are others than ours: {row}")
    for load, services in report["loads"].items():
        for name, numbers in services.items():
            if numbers.get("failed") or numbers.get("refused"):
                found.append(f"{load}: requests of {name} were refused or failed")
    return found


def _beside_infinity(mark: Mark, loads: Loads, but: str = "") -> dict[str, Any]:
    """`but` leaves services out, and then the ratio is stated only."""
    services = loads.get(mark.load, {})
    numbers = {
        name: row[mark.number]
        for name, row in services.items()
        if name.split()[0] in (OURS, "infinity") and not (but and but in name)
    }
    bound = None if but else mark.bound
    ours, theirs = _best(OURS, numbers, mark), _best("infinity", numbers, mark)
    if ours is None or theirs is None:
        return _row(None, "infinity", bound, mark.is_least)
    return _row(numbers[ours] / numbers[theirs], theirs, bound, mark.is_least) | {"ours": ours}


def _best(who: str, numbers: dict[str, float], mark: Mark) -> str | None:
    names = [name for name in numbers if name.split()[0] == who]
    best = max if mark.is_least else min
    return best(names, key=lambda name: numbers[name], default=None)


def _beside_in_process(kind: str, loads: Loads, bound: float | None) -> dict[str, Any]:
    alone = f"in process: {kind}"
    served = [
        services[OURS]["items_per_s"] / services[alone]["items_per_s"]
        for services in loads.values()
        if OURS in services and alone in services
    ]
    return _row(max(served, default=None), alone, bound, is_least=True)


def _row(value: float | None, against: str, bound: float | None, is_least: bool) -> dict[str, Any]:
    row = {"value": None if value is None else round(value, 3), "against": against}
    if bound is None:
        return row | {"mark": "stated", "met": True}
    is_met = value is not None and (value >= bound if is_least else value <= bound)
    return row | {"mark": f"{'>=' if is_least else '<='} {bound:g}", "met": is_met}
