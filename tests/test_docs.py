"""What README and docs show exists: every command, option, file, setting and route."""

import itertools
import json
import re
import shlex
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from clipserve.cli import app
from clipserve.config import describe_fields, load_config, preset_names
from clipserve.objectives import check_against_architecture
from clipserve.towers import architecture_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDED = {"out": "out=runs/x", "data.train": "data.train=x", "train.steps": "train.steps=1"}
"""what a shown configuration may leave out, for the run is not its subject"""


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"(?:[A-Z_]+=\S+ )*(clipserve .*)", line)
                if command:
                    found.append((page.name, command[1].split("  #")[0].strip()))
    return found


def shown_configurations() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
            if "[model]" in block or "[[objectives]]" in block:
                found.append((page.name, block))
    return found


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_shown_commands_and_options_exist(page: str, line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not getattr(command, "commands", {}) or words[0] == "--help", f"{page}: {line}"
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= options_of(command), f"{page}: {line}"


def test_there_are_commands_to_check() -> None:
    assert len(shown_commands()) > 10


def test_every_subcommand_is_shown_somewhere() -> None:
    text = "".join(page.read_text() for page in PAGES)
    command: Any = typer.main.get_command(app)
    for name in command.commands:
        assert f"clipserve {name}" in text, name


def test_the_map_names_every_file_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```\n(clipserve/ .*?)```", readme, re.DOTALL)
    shown: set[str] = set()
    folder = ""
    for line in block.splitlines():
        name = line.split()[0] if line.strip() else ""
        if line and not line.startswith(" "):
            folder = name
            shown.add(name)
        elif line.startswith("  ") and not line.startswith("   "):
            shown.add(folder + name)
    for package in ("clipserve", "training", "index", "service"):
        for file in (ROOT / package).glob("*.py"):
            if not file.name.startswith("__"):
                assert f"{package}/{file.name}" in shown, file
    for path in shown:
        assert (ROOT / path).exists(), path


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for name, _, meaning in describe_fields():
        assert f"`{name}`" in text, name
        assert meaning in text, name


@pytest.mark.parametrize(("page", "block"), shown_configurations())
def test_shown_configurations_are_valid(page: str, block: str, tmp_path: Path) -> None:
    given = tomllib.loads(block)
    absent = NEEDED.keys() - given
    absent -= {f"data.{name}" for name in given.get("data", {})}
    if given.get("train", {}).keys() & {"steps", "epochs"}:
        absent -= {"train.steps"}
    file = tmp_path / "shown.toml"
    file.write_text(block)
    config = load_config(file, [NEEDED[name] for name in sorted(absent)])
    architecture = config.model.architecture
    if architecture is None:  # that of model.pretrained
        return
    table = architecture
    if isinstance(architecture, str):
        table = architecture_config(architecture)
    check_against_architecture(
        config.objectives,
        has_fusion="fusion_cfg" in table,
        has_token_head=table.get("fusion_cfg", {}).get("token_head", True),
        has_bias="init_logit_bias" in table,
        has_decoder="multimodal_cfg" in table,
    )


def test_objectives_shows_configurations() -> None:
    assert sum(page == "objectives.md" for page, _ in shown_configurations()) >= 7


def test_every_objective_is_explained_with_its_settings() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    sections = text.split("\n## ")
    for name, _, _ in describe_fields():
        if name.startswith("objectives[]."):
            _, kinds, setting = name.split(".")
            for kind in kinds.split("/"):
                assert f"`{kind}`" in text, kind
            first = kinds.split("/")[0].replace("barlow_twins", "simclr and others")
            (section,) = (part for part in sections if part.startswith(first))
            assert setting in ("name", "weight") or f"`{setting}`" in section, name


def test_every_preset_is_explained() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    for name in preset_names():
        assert f"| `{name}` |" in text, name


def test_every_service_setting_is_documented() -> None:
    from service.settings import Settings

    text = (ROOT / "docs" / "service.md").read_text()
    for name, field in Settings.model_fields.items():
        default = field.default
        if field.default_factory is not None:
            shown = "number of CPUs, or the container's share of them, at most 8"
        elif default is None or default == ():
            shown = "none"
        elif isinstance(default, tuple):
            shown = ",".join(map(str, default))
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
        meaning = " ".join((field.description or "").split())
        assert f"| `CLIPSERVE_{name.upper()}` | {shown} | {meaning} |" in text, name


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_numbers_in_the_readme_are_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    results = ROOT / "benchmarks" / "results"
    demo = json.loads((results / "demo.json").read_text())
    for shown in (f"{demo['train_seconds']:.0f} s of training", f"{demo['mean_r1']:.1%}"):
        assert shown in text
    assert f"{demo['mean_r10']:.1%}" in text
    assert demo["date"] in text
    for name in ("embedding_amx.json", "embedding.json"):
        embedding = json.loads((results / name).read_text())
        for kind, batch in itertools.product(("pictures", "texts"), (1, 32)):
            values = embedding[kind][f"batch {batch}"].values()
            assert f"| {kind}, batch {batch} | {' | '.join(map(str, values))} |" in text
    loader = json.loads((results / "loader.json").read_text())
    for name, case in loader["results"].items():
        rates = [f"{case[who]['samples_per_s']:.0f}" for who in ("clipserve", "open_clip")]
        cells = [name, *rates, str(case["ratio"]), str(case["ratio_of_worker_cpu"])]
        assert f"| {' | '.join(cells)} |" in text


def test_numbers_of_the_service_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "service.md").read_text()
    results = ROOT / "benchmarks" / "results"
    report = json.loads((results / "service_amx.json").read_text())
    assert report["date"] in text
    for work, row in report["loads"].items():
        both = [[row[one] for one in row if one.startswith(who)] for who in ("clipserve", "infin")]
        rates = [max(one["items_per_s"] for one in found) for found in both]
        waits = [min(one["p50_ms"] for one in found) for found in both]
        cells = [work, *(f"{rate:.1f}" for rate in rates), *(f"{wait:.0f}" for wait in waits)]
        assert f"| {' | '.join(cells)} |" in text, work
    report = json.loads((results / "service.json").read_text())
    assert report["date"] in text
    in_fp32 = ("infinity float32", "infinity bfloat16")
    columns = [["clipserve"], ["clipserve int8"], in_fp32, ["infinity int8"], ["clip-server"]]
    for work, row in report["loads"].items():
        rates = [max(row[name]["items_per_s"] for name in names) for names in columns]
        waits = [min(row[name]["p50_ms"] for name in names) for names in columns]
        assert f"| {work} | {' | '.join(f'{rate:.1f}' for rate in rates)} |" in text, work
        assert f"| {work} | {' | '.join(f'{wait:.0f}' for wait in waits)} |" in text, work
    paced = report["clipserve_at_80_percent_of_32_clients"]
    for what in ("text", "picture"):
        times = paced[f"1 {what}"]
        assert f"a {what} took {times['p50_ms']:.0f} ms (p99 {times['p99_ms']:.0f})" in text
    overload = json.loads((results / "overload.json").read_text())
    shares = [f"{row['goodput_share']:.2f}" for row in overload["overload"].values()]
    assert f"answered {shares[0]} of it in texts and {shares[1]} in pictures" in text
    assert f"failed none of {overload['reloads']['answered']:,}" in text
    poison = json.loads((results / "poison.json").read_text())
    assert poison["problems"] == []
    start, half, end, peak = (
        f"{poison['rss_mb'][one]:,.0f}" for one in ("start", "half way", "end", "peak")
    )
    assert (
        f"{start} MB resident at the start, {peak} at the peak, {half} half way and {end}" in text
    )
    startup = json.loads((results / "startup.json").read_text())
    assert f"ready after {startup['ready_s']['median']:.1f} s" in text


def test_numbers_of_the_index_are_the_committed_results() -> None:
    text = " ".join((ROOT / "docs" / "index.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    kinds = json.loads((results / "fashion_search.json").read_text())["kinds"]
    graph, lists, exact = (kinds[kind] for kind in ("HNSW32,Flat", "IVF128,SQ8", "exact"))
    for row in (graph, lists):
        assert f"{row['queries_per_second']:,.0f}" in text
    assert f"found {graph['of_exact_10']:.3f} of the exact ten" in text
    assert f"{lists['queries_per_second']:,.0f} and {lists['of_exact_10']:.3f}" in text
    assert f"comparing all {exact['queries_per_second']:.0f}" in text
    parts = json.loads((results / "index.json").read_text())["runs"]["1000000"]
    plain, rescored = parts["speed faiss SQ8"], parts["speed faiss SQ8 refined"]
    for target, row in rescored.items():
        if not isinstance(row, dict):
            continue
        ours, times = (
            row["ours"],
            [
                f"{part['ratio_batch_qps']:.2f}, {part['ratio_single_qps']:.2f}"
                if part["theirs"]
                else "never gets there"
                for part in (plain[target], row)
            ],
        )
        single = f"{ours['single']['p50_ms']:.1f} / {ours['single']['p99_ms']:.1f} ms"
        cells = [f"{ours['recall']:.3f}", f"{ours['batch']['qps']:.0f}", single, *times]
        assert f"| {' | '.join(cells)} |" in text
    built = [part["seconds"] for name, part in parts.items() if name.startswith("build clipserve")]
    assert f"{min(built):.0f} to {max(built):.0f} s with tuning" in text
    faiss, refined, hnswlib = (
        f"{parts[f'build {name}']['seconds']:.0f} s"
        for name in ("faiss SQ8", "faiss SQ8 refined", "hnswlib")
    )
    assert f"SQ8 took {faiss}, exact re-scoring {refined} more, hnswlib {hnswlib}" in text
    filtered = [row for row in parts["filtered faiss SQ8"].values() if isinstance(row, dict)]
    half, tenth, hundredth, thousandth = (row["ratio_batch_qps"] for row in filtered)
    assert (
        f"batches run at {half:.2f}, {tenth:.2f}, {hundredth:.1f} and {thousandth:.0f} times"
        in text
    )


def test_numbers_of_training_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    results = ROOT / "benchmarks" / "results"
    who = ("clipserve", "clipserve compiled", "open_clip", "open_clip compiled")
    for name in ("train_amx.json", "train.json", "train_vit_b32.json"):
        report = json.loads((results / name).read_text())
        assert report["date"] in text
        for case, row in report["results"].items():
            rates = [str(row["samples_per_s"].get(one, "")) for one in who]
            line = " | ".join([case, *rates, str(row["ratio"])])
            assert f"| {line.replace('|  |', '| |')} |" in text
    profiled = json.loads((results / "train_profile.json").read_text())
    for way, row in profiled["ways"].items():
        shares = [f"{100 * share:.0f}" for share in row["shares"].values()]
        assert f"| {way} | {row['samples_per_s']} | {' | '.join(shares)} | {row['mfu']} |" in text


def test_numbers_of_the_objectives_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())
    assert report["date"] in text
    assert report["runs"]
    for name, runs in report["runs"].items():
        values = [100 * run["t2i_r1"] for run in runs.values()]
        shown = f"{statistics.mean(values):.1f} \u00b1 {statistics.stdev(values):.1f}"
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} | "))
        assert f"| {len(runs)} | " in row
        assert shown in row, name


def test_numbers_of_an_export_over_many_sizes_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "export.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "export_sizes.json").read_text())
    for kind, row in report["results"].items():
        assert f"| {kind} | {row['pictures']} | {row['least']:.6f} | {row['median']:.6f} |" in text


def test_numbers_of_the_contrastive_loss_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "contrastive.json").read_text())
    for size, row in report["peak_mb"].items():
        cells = [f"{row[name]:.0f}" for name in ("tiled", "dense", "open_clip")]
        shown = [f"{int(size):,}", *cells, str(row["tiled / dense"])]
        assert f"| {' | '.join(shown)} |" in text
    assert f"tiles take {report['seconds']['tiled / dense']} of the dense time" in text


def test_numbers_of_fine_tuning_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "finetune.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text())
    methods = report["methods"]
    assert report["date"] in text
    assert f"{report['steps']} steps" in text
    shown = [f"| alpha | {' | '.join(methods)} |"]
    for rows in zip(*(method["alphas"] for method in methods.values()), strict=True):
        recalls = [
            [f"{100 * row[task]['mean_r10']:.1f}" for task in ("old", "new")] for row in rows
        ]
        shown.append(f"| {rows[0]['alpha']:g} | {' | '.join(map(' / '.join, recalls))} |")
    shares = [f"{method['trained_share']:.1%}" for method in methods.values()]
    shown.append(f"| trained part | {' | '.join(shares)} |")
    for words, key in (("its own gain", "gained"), ("the largest gain", "of_largest")):
        alphas = [
            [f"{row['alpha']:g}" for row in method["alphas"] if is_enough(row, key)]
            for method in methods.values()
        ]
        cells = [", ".join(found) or "none" for found in alphas]
        shown.append(f"| 95 % kept, 90 % of {words} at | {' | '.join(cells)} |")
    for line in shown:
        assert line in text


def is_enough(row: dict[str, Any], key: str) -> bool:
    return row["kept"] >= 0.95 and row[key] is not None and row[key] >= 0.9
