"""The parts of benchmarks/index for one number of vectors: build, recall, memory, and turns."""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.index.data import SHARES, Data
from benchmarks.index.processes import ContenderError, Process, contender_folder, say
from benchmarks.index.report import Report, rounded

FILTER_TARGET = 0.95
NEW_FILTERS = 20
EQUAL = 0.0005
"""recalls closer than that are equal"""
FINE = 50
"""a knob is found to 2 %"""


@dataclass(frozen=True)
class Setting:
    """A contender at one value of its knob, and the recall that it has there."""

    process: Process
    knob: float
    recall: float


class Sweep:
    """Recalls by the knob, which they grow with."""

    def __init__(self, process: Process, most: int, share: float = 1) -> None:
        self._process, self._most, self._share = process, most, share
        self._known: dict[int, float] = {}

    def least(self, target: float) -> dict[str, float] | None:
        """The least knob that reaches the target, and its recall; None if none does."""
        high = 1
        while self._recall(high) < target:
            if high >= self._most or self._is_done(high):
                return None
            high = min(2 * high, self._most)
        low = high // 2  # not enough, or 0
        while high - low > max(1, high // FINE):
            middle = (low + high) // 2
            low, high = (low, middle) if self._recall(middle) >= target else (middle, high)
        return {"knob": high, "recall": self._recall(high)}

    def _recall(self, knob: int) -> float:
        if knob not in self._known:
            asked = self._process.ask("recall", knob=knob, share=self._share)
            self._known[knob] = asked["recall"]
        return self._known[knob]

    def _is_done(self, knob: int) -> bool:
        """Four times as much has brought nothing: what is missed is lost in the codes."""
        return knob >= 64 and self._recall(knob) - self._recall(knob // 4) < EQUAL


class Bench:
    """`ours`: recall target -> name of ours built for it."""

    def __init__(
        self, report: Report, arguments: argparse.Namespace, count: int, ours: dict[float, str]
    ) -> None:
        self._report, self._rounds, self._threads = report, arguments.rounds, arguments.threads
        self._seconds = arguments.seconds
        self._redo = tuple(filter(None, arguments.redo.split(",")))
        self._processes: dict[str, Process] = {}
        self.ours = ours
        self.data = Data(arguments.folder / f"{count}x{arguments.dim}", count, arguments.dim)
        self._parts: dict[str, Any] = report.value["runs"].setdefault(str(count), {})

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Unless it is done already. What a contender cannot do is noted, and the rest goes on."""
        if name in self._parts and not self._is_redone(name):
            return
        started, load = time.monotonic(), os.getloadavg()[0]
        say(f"{self.data.count:,} vectors: {name} ...")
        try:
            found = measure()
        except (ContenderError, KeyError) as error:
            say(f"  {error!r}")
            self.close_all()
            return
        seconds = round(time.monotonic() - started, 1)
        how = {"rounds": self._rounds, "took_s": seconds, "load_before": round(load, 1)}
        self._parts[name] = rounded(found) | how
        self._report.save()
        say(f"  {seconds} s")

    def is_ours_built(self) -> bool:
        return all(self._built_file(name).exists() for name in self.ours.values())

    def build(self, name: str) -> dict[str, Any]:
        done = self._built_file(name)
        if not done.exists() or self._is_redone(f"build {name}"):
            shutil.rmtree(done.parent, ignore_errors=True)
            builder = Process.start(name, self.data, self._threads)
            try:
                done.write_text(json.dumps(builder.ask("build")))
            finally:
                builder.close()
        found: dict[str, Any] = json.loads(done.read_text())
        return found

    def _is_redone(self, part: str) -> bool:
        return bool(self._redo) and part.startswith(self._redo)

    def close(self, name: str) -> None:
        if name in self._processes:
            self._processes.pop(name).close()

    def close_all(self) -> None:
        for name in [*self._processes]:
            self.close(name)

    def memory(self, name: str) -> dict[str, Any]:
        """Of a process that has opened the index and searched it."""
        self.close(name)
        contender = self._opened(name)
        found = contender.ask("recall", knob=32)
        return contender.ask("memory") | {"recall_meanwhile": found["recall"]}

    def recalls(self, name: str, is_filtered: bool) -> dict[str, Any]:
        """By target and, for 0.95, by what a filter lets through: recall and the knob for it.

        Of another than ours the least knob that finds as much as ours does.
        """
        process = self._opened(name)
        shares = SHARES if is_filtered else ()
        found: dict[str, Any] = {}
        if process.most is None:
            found["all"] = {"knob": 0, **process.ask("recall", knob=0)}
            for share in shares:
                found[f"{share:g}"] = {"knob": 0, **process.ask("recall", knob=0, share=share)}
        else:
            sweep = Sweep(process, process.most)
            for target, ours in self.ours.items():
                own = self._parts[f"recall {ours}"]["all"]["recall"]
                found[f"{target}"] = sweep.least(own - EQUAL)
            for share in shares:
                filtered = Sweep(process, process.most, share)
                found[f"{share:g}"] = filtered.least(FILTER_TARGET)
        if not name.startswith("clipserve ivf"):
            self.close(name)
        return found

    def with_items(self) -> dict[str, Any]:
        """Single queries whose answers have caption, source and metadata, too."""
        ours = Setting(self._opened(self.ours[FILTER_TARGET]), 0, 0)
        modes = ("single", "single_items")
        ours.process.ask("recall", knob=0)
        rounds = [{mode: self._speed(ours, mode) for mode in modes} for _ in range(self._rounds)]
        return {mode: _medians([one[mode] for one in rounds]) for mode in modes}

    def speed(self, name: str) -> dict[str, Any]:
        found = {}
        for target, ours in self.ours.items():
            theirs = self._setting(name, f"{target}") or self._setting(name, "all")
            settings = {"ours": self._setting(ours, "all"), "theirs": theirs}
            modes = ["batch", "single"] + ["callers"] * (target == FILTER_TARGET)
            found[f"{target}"] = self._take_turns(settings, modes)
            say(f"  at {target}: {_brief(found[f'{target}'])}")
        return found

    def filtered(self, name: str) -> dict[str, Any]:
        found = {}
        for share in SHARES:
            settings = {
                "ours": self._setting(self.ours[FILTER_TARGET], f"{share:g}"),
                "theirs": self._setting(name, f"{share:g}"),
            }
            turns = self._take_turns(settings, ["batch", "single"], share)
            for who, setting in settings.items():
                if setting is not None:
                    command = {"knob": setting.knob, "share": share, "number": NEW_FILTERS}
                    turns[who]["new_filter"] = setting.process.ask("new_filters", **command)
            found[f"{share:g}"] = turns
            say(f"  {share:g} of all: {_brief(turns)}")
        return found

    def _setting(self, name: str, which: str) -> Setting | None:
        known = self._parts[f"recall {name}"].get(which)
        return known and Setting(self._opened(name), known["knob"], known["recall"])

    def _take_turns(
        self, settings: dict[str, Setting | None], modes: list[str], share: float = 1
    ) -> dict[str, Any]:
        """The median of each, and ours by the other's."""
        there = {who: setting for who, setting in settings.items() if setting is not None}
        rounds: dict[str, dict[str, list[dict[str, float]]]]
        rounds = {who: {mode: [] for mode in modes} for who in there}
        for _ in range(self._rounds):
            for mode in modes:
                for who, setting in there.items():
                    rounds[who][mode].append(self._speed(setting, mode, share))
        found: dict[str, Any] = {who: None for who in settings if settings[who] is None}
        for who, setting in there.items():
            found[who] = {"knob": setting.knob, "recall": setting.recall}
            found[who] |= {mode: _medians(of) for mode, of in rounds[who].items()}
        for mode in modes if "theirs" in there else ():
            pairs = zip(rounds["ours"][mode], rounds["theirs"][mode], strict=True)
            ratios = [mine["qps"] / his["qps"] for mine, his in pairs]
            found[f"ratio_{mode}_qps"] = statistics.median(ratios)
        return found

    def _speed(self, setting: Setting, mode: str, share: float = 1) -> dict[str, float]:
        command = {"knob": setting.knob, "mode": mode, "seconds": self._seconds, "share": share}
        return setting.process.ask("speed", **command)

    def _opened(self, name: str) -> Process:
        """The contender's process, which stays until `close`."""
        if name not in self._processes:
            process = self._processes[name] = Process.start(name, self.data, self._threads)
            answer = process.ask("open")
            process.knob, process.most = answer["knob"], answer["most"]
        return self._processes[name]

    def _built_file(self, name: str) -> Any:
        return contender_folder(name, self.data) / "built.json"


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _brief(found: dict[str, Any]) -> str:
    shown = [
        f"{who} {at['recall']:.3f} {at['batch']['qps']:.0f}/s, one {at['single']['p50_ms']:.2f} ms"
        for who, at in found.items()
        if isinstance(at, dict)
    ]
    ratios = [f"{found.get(f'ratio_{mode}_qps', 0):.2f}" for mode in ("batch", "single")]
    return "; ".join(shown) + f"; ratios {', '.join(ratios)}"
