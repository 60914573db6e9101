"""The images' files: what can be known of them without building any; docker/prove.py does that."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from service.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
IMAGES = ("service", "training")
OTHER_VARIABLES = {"CLIPSERVE_CACHE"}
"""read by clipserve itself, not a setting of the service"""


def _import(name: str) -> Any:
    """A module of docker/, which is a folder of scripts and not installed."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


dockerfile = _import("dockerfile")


def parsed(name: str) -> Any:
    return dockerfile.parse((DOCKER / f"{name}.Dockerfile").read_text())


def described(name: str, variant: str = "cpu") -> Any:
    """What the last stage, on top of those it comes from, says of its containers."""
    file = parsed(name)
    arguments = file.arguments | {"VARIANT": variant}
    stages = {stage.name: stage for stage in file.stages}
    chain = [stages[name]]
    while (base := dockerfile.expand(chain[-1].base, arguments)) in stages:
        chain.append(stages[base])
    image = dockerfile.Image(env={"PATH": "/usr/bin"})
    for stage in reversed(chain):
        for step in stage.steps:
            if step.name in dockerfile.DESCRIBING:
                image.apply(step, arguments)
    return image


def composed(name: str = "compose.yaml") -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


# The parser


def test_lines_are_joined_and_comments_between_them_dropped() -> None:
    file = dockerfile.parse("FROM a AS b\nRUN one \\\n  # why\n  && two\n")
    (step,) = file.stages[0].steps
    assert step.text.split() == ["one", "&&", "two"]


def test_flags_are_split_from_the_command() -> None:
    file = dockerfile.parse("FROM a\nRUN --mount=type=cache,target=/c pip install x\n")
    (step,) = file.stages[0].steps
    assert step.mounts() == [{"type": "cache", "target": "/c"}]
    assert step.text == "pip install x"


@pytest.mark.parametrize(
    "line",
    [
        "ADD x y",
        "ONBUILD RUN x",
        "COPY --from=x a b",
        "RUN --network=none x",
        "RUN <<END",
        "RUN x \\",
        "FROM a b",
    ],
)
def test_what_the_prover_does_not_know_is_an_error(line: str) -> None:
    with pytest.raises(dockerfile.DockerfileError):
        dockerfile.parse(f"FROM a\n{line}\n")


def test_a_command_with_a_shell_before_it_is_an_error() -> None:
    (stage,) = dockerfile.parse("FROM a\nENTRYPOINT clipserve\n").stages
    with pytest.raises(dockerfile.DockerfileError, match=r"ENTRYPOINT needs the form \[\.\.\.\]"):
        dockerfile.Image().apply(stage.steps[0], {})


def test_arguments_reach_the_description_and_env_wins() -> None:
    text = 'ARG V=1\nFROM a\nARG V\nARG W="2"\nARG Y="4 5"\nENV W=3 X=$V\nLABEL both=$W-${V}\n'
    file = dockerfile.parse(text)
    image = dockerfile.Image()
    for step in file.stages[0].steps:
        image.apply(step, file.arguments)
    assert image.env == {"W": "3", "X": "1"}
    assert image.variables == {"V": "1", "W": "2", "Y": "4 5"}
    assert image.labels == {"both": "3-1"}


def test_the_last_pattern_that_fits_decides_what_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("*\n!kept\n**/*.pyc\n")
    (tmp_path / "kept").mkdir()
    for name in ("kept/a.py", "kept/a.pyc", "b.py"):
        (tmp_path / name).touch()
    context = dockerfile.Context(tmp_path)
    assert context.files("kept") == [Path("kept/a.py")]
    with pytest.raises(dockerfile.DockerfileError, match=r"b\.py: not in the build context"):
        context.files("b.py")


# The images


@pytest.mark.parametrize("name", IMAGES)
def test_every_copied_file_is_there_and_not_ignored(name: str) -> None:
    context = dockerfile.Context(ROOT)
    copies = [step for stage in parsed(name).stages for step in stage.steps if step.name == "COPY"]
    assert copies
    for step in copies:
        for source in step.text.split()[:-1]:
            assert context.files(source), source


def test_every_package_of_ours_is_copied() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in table["tool"]["setuptools"]["packages"]}
    for name in IMAGES:
        steps = [step for stage in parsed(name).stages for step in stage.steps]
        assert packages <= {step.text.split()[0] for step in steps if step.name == "COPY"}


@pytest.mark.parametrize("path", [".git", "docker/secrets", "docker/compose.yaml", "tests"])
def test_what_no_image_needs_is_not_in_the_build_context(path: str) -> None:
    with pytest.raises(dockerfile.DockerfileError):
        dockerfile.Context(ROOT).files(path)


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
@pytest.mark.parametrize("name", IMAGES)
def test_containers_run_clipserve_as_a_fixed_user_with_no_rights(name: str, variant: str) -> None:
    image = described(name, variant)
    assert image.user == "10001:10001"
    assert image.entrypoint == ["clipserve"]
    assert image.stop_signal == "SIGTERM"
    assert image.labels["org.opencontainers.image.variant"] == variant
    assert ("NVIDIA_VISIBLE_DEVICES" in image.env) == (variant == "gpu")


@pytest.mark.parametrize("name", IMAGES)
def test_a_read_only_root_is_enough(name: str) -> None:
    image = described(name)
    written = ("HOME", "XDG_CACHE_HOME", "CLIPSERVE_CACHE", "TORCHINDUCTOR_CACHE_DIR")
    for variable in (*written, "TRITON_CACHE_DIR"):
        assert image.env[variable].startswith(("/tmp", *image.volumes)), variable
    assert image.workdir in image.volumes


def test_the_service_has_a_health_check_and_a_run_has_none() -> None:
    assert described("service").healthcheck == ["python", "/opt/clipserve/healthcheck.py"]
    assert described("training").healthcheck == []


@pytest.mark.parametrize("name", IMAGES)
def test_the_base_image_is_pinned_and_may_be_pinned_by_digest(name: str) -> None:
    file = parsed(name)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", file.arguments["PYTHON_IMAGE"])
    names = {stage.name for stage in file.stages} | {"${PYTHON_IMAGE}", "${VARIANT}"}
    assert {stage.base for stage in file.stages} <= names


@pytest.mark.parametrize("name", IMAGES)
def test_everything_that_is_installed_is_pinned(name: str) -> None:
    steps = [step for stage in parsed(name).stages for step in stage.steps if step.name == "RUN"]
    installs = [step.text for step in steps if "pip install" in step.text]
    assert len(installs) >= 4
    for text in installs:
        assert "constraints.txt" in text or "--no-index" in text
    for step in steps:
        for words in re.findall(r"apt-get install ([^&]*)", step.text):
            packages = [word for word in words.split() if not word.startswith("-")]
            assert all("=" in package for package in packages), packages


def test_both_images_share_their_first_layers() -> None:
    service, training = (
        {stage.name: [(step.name, step.flags, step.text) for step in stage.steps] for stage in file}
        for file in (parsed(name).stages for name in IMAGES)
    )
    for stage in ("build", "dependencies", "cpu", "gpu"):
        assert service[stage] == training[stage]


def test_variables_of_the_image_and_of_compose_are_settings() -> None:
    variables = described("service").env | composed()["services"]["service"]["environment"]
    ours = {name for name in variables if name.startswith("CLIPSERVE_")} - OTHER_VARIABLES
    assert ours <= {f"CLIPSERVE_{name.upper()}" for name in Settings.model_fields}


def test_requirements_are_those_of_pyproject(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    subprocess.run([sys.executable, DOCKER / "requirements.py"], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = {file.stem: file.read_text() for file in (tmp_path / "requirements").iterdir()}
    assert written["base"].splitlines() == project["dependencies"]
    assert written["gpu"].splitlines() == project["optional-dependencies"]["gpu"]
    assert written["constraints"] == (ROOT / "constraints.txt").read_text()


# The health check


@pytest.fixture
def answers() -> Iterator[tuple[list[int], int]]:
    """(statuses, port): a server that answers each request with the next status."""
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield statuses, server.server_port
        server.shutdown()
        thread.join()


def check_health(port: int) -> int:
    environment = {"CLIPSERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    script = [sys.executable, DOCKER / "healthcheck.py"]
    return subprocess.run(script, env=environment, capture_output=True).returncode


def test_the_health_check_says_what_the_service_says(answers: tuple[list[int], int]) -> None:
    statuses, port = answers
    for status, code in ((200, 0), (503, 1)):
        statuses.append(status)
        assert check_health(port) == code


def test_the_health_check_fails_where_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert check_health(taken.getsockname()[1]) == 1


# Compose, Prometheus, Grafana


def test_compose_runs_the_service_and_what_watches_it() -> None:
    assert composed()["services"].keys() == {"service", "prometheus", "grafana"}
    assert composed("compose.gpu.yaml")["services"].keys() == {"service"}
    for table in composed()["services"].values():
        assert table["read_only"] is True
        assert table["cap_drop"] == ["ALL"]
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", table["image"])


def test_compose_builds_the_dockerfile_and_keeps_its_volume() -> None:
    service = composed()["services"]["service"]
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve().is_file()
    assert service["volumes"] == [f"data:{described('service').volumes[0]}"]
    assert composed("compose.gpu.yaml")["services"]["service"]["build"]["args"]["VARIANT"] == "gpu"


def test_no_port_is_published_without_a_key_and_none_but_ours_beyond_this_machine() -> None:
    services = composed()["services"]
    for name, table in services.items():
        for port in table.get("ports", []):
            host = "${CLIPSERVE_ADDRESS:-127.0.0.1}:" if name == "service" else "127.0.0.1:"
            assert port.startswith(host)
            assert table["secrets"]
    keys = services["service"]["environment"]["CLIPSERVE_API_KEYS_FILE"]
    assert keys == f"/run/secrets/{services['service']['secrets'][0]}"


def test_every_secret_is_a_file_that_git_does_not_take() -> None:
    compose = composed()
    used = [name for table in compose["services"].values() for name in table["secrets"]]
    assert sorted(used) == sorted(compose["secrets"])
    for name, secret in compose["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    assert (DOCKER / "secrets" / ".gitignore").read_text() == "*\n!.gitignore\n"


def test_prometheus_asks_the_service_with_a_key_that_compose_lends_it() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (key,) = composed()["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{key}"}
    assert job["static_configs"] == [{"targets": [f"service:{described('service').ports[0]}"]}]


def dashboard() -> Any:
    return json.loads((DOCKER / "grafana" / "dashboards" / "clipserve.json").read_text())


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """The names of the service's samples, each with its labels."""
    collectors = Telemetry()._registry._collector_to_names
    return {name: set(found._labelnames) for found, names in collectors.items() for name in names}


def test_the_dashboard_asks_for_metrics_and_labels_that_the_service_exports() -> None:
    known = exported()
    assert len(queries()) > 10
    for query in queries():
        names = set(re.findall(r"clipserve_\w+", query))
        assert names
        assert names <= known.keys(), query
        labels = {word for by in re.findall(r"by \(([^)]*)\)", query) for word in by.split(", ")}
        labels |= set(re.findall(r"(\w+)=~", query))
        labels.discard("le")  # every histogram's
        for name in names:
            assert labels <= known[name], query


def test_the_dashboard_shows_every_metric() -> None:
    text = " ".join(queries())
    for name in exported():
        metric = re.sub(r"_(total|created|bucket|sum|count)$", "", name)
        assert metric in text, metric


def test_the_dashboard_reads_the_provisioned_source_and_is_provisioned() -> None:
    folder = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((folder / "dashboards" / "clipserve.yaml").read_text())[
        "providers"
    ]
    mounts = composed()["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
