"""The result file of benchmarks/index: finished parts, and what they say in one place."""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.embedding import processor
from benchmarks.index.worker import ASKED, BATCH


class Report:
    """What is in it stays, until a part is deleted by hand."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        self.path = path
        self.value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.value.get("dim", arguments.dim) != arguments.dim:
            sys.exit(f"{path} is of {self.value['dim']} dimensions; give another --out")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.value = {
            "benchmark": "index",
            "unit": "queries per second at recall@10, medians of rounds that take turns; bytes a"
            " vector; milliseconds a query",
            "date": date.today().isoformat(),
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "memory_gib": round(memory / 2**30, 1),
            },
            "python": platform.python_version(),
            "dim": arguments.dim,
            "threads": arguments.threads,
            "batch": BATCH,
            "queries": ASKED,
            "runs": self.value.get("runs", {}),
        }

    def save(self) -> None:
        self.value["summary"] = {
            count: _summarise(parts) for count, parts in self.value["runs"].items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.value, indent=1) + "\n")
        aside.replace(self.path)


def rounded(value: Any) -> Any:
    """Four digits that count."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def _summarise(parts: dict[str, Any]) -> dict[str, Any]:
    """Ours by the others at equal recall, and the recalls of filtered searches."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        what, _, who = name.partition(" ")
        if what == "speed":
            found[f"ours / {who}"] = {
                target: {
                    key.removeprefix("ratio_").removesuffix("_qps"): ratio
                    for key, ratio in at.items()
                    if key.endswith("_qps")
                }
                for target, at in part.items()
                if isinstance(at, dict)
            }
        elif what == "filtered":
            found[f"filtered beside {who}"] = {
                share: {"recall": at["ours"]["recall"], "batch": at.get("ratio_batch_qps")}
                for share, at in part.items()
                if isinstance(at, dict)
            }
    return found
