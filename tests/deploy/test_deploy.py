"""The files of deploy/: that they say what they must, fit their schemas, and name only what Caravan really has."""

from __future__ import annotations

import configparser
import fnmatch
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import promql_parser
import pytest
import yaml

from caravan.apps.metrics import PLATFORM
from caravan.apps.services import SERVICES, WEB
from caravan.fulfilment.alerts import NAMES
from caravan.settings import PREFIX, Settings
from tests.apps.test_metrics import exported

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "caravan.json").read_text())
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
PROGRAMS = {"outbox-relay", *SERVICES}
ENVIRONMENT = {PREFIX + field.upper() for field in Settings.model_fields} | {
    "POSTGRES_URL",
    "KAFKA_BROKER",
    "REDIS_URL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
}


# ------------------------------------------------------------------ compose


def test_compose_fits_its_schema() -> None:
    # The specification's own, by way of check-jsonschema 0.39.0; Apache-2.0, see LICENSE.compose-spec.
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    errors = [f"{'/'.join(map(str, e.instance_path))}: {e.message}" for e in jsonschema_rs.iter_errors(schema, COMPOSE)]
    assert errors == []


def test_compose_has_every_service_under_the_names_of_the_guides() -> None:
    services = COMPOSE["services"]
    assert set(services) >= PROGRAMS | {"postgres", "kafka", "redis", "proxy"}
    for name, service in services.items():
        assert service["container_name"] == f"kodingcaravan-{name}"
    for name in PROGRAMS:
        assert services[name]["command"] == ["serve", name]


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_what_runs_is_pinned_and_starts_again(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[a-z./-]+:v?\d+\.\d+\.?[\w.-]*|caravan:\$\{CARAVAN_BUILD:-local\}", service["image"])
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    if "profiles" not in service:
        assert "healthcheck" in service
    # Only the proxy is reached from outside; the rest at most from the machine itself.
    for port in service.get("ports", ()):
        assert name == "proxy" or port.startswith("127.0.0.1:")


def test_services_ask_for_progress_wait_for_the_schema_and_know_only_settings_that_exist() -> None:
    for name in PROGRAMS:
        service = COMPOSE["services"][name]
        assert "/readyz" in service["healthcheck"]["test"][-1]
        assert service["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
        assert set(service["environment"]) <= ENVIRONMENT
    proxy = COMPOSE["services"]["proxy"]["networks"]["default"]["ipv4_address"]
    assert COMPOSE["services"]["payment-service"]["environment"]["CARAVAN_TRUSTED_PROXIES"] == proxy


def test_the_example_of_an_environment_names_settings_that_exist() -> None:
    names = set(re.findall(r"^#?([A-Z_]+)=", (DEPLOY / "example.env").read_text(), re.MULTILINE))
    ours = {name for name in names if name.startswith((PREFIX, "OTEL_"))}
    assert ours
    assert ours <= ENVIRONMENT
    asked = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text())) - {"CARAVAN_BUILD"}
    assert asked <= names


# ------------------------------------------------------------------ the proxy


def proxied() -> list[tuple[list[str], str]]:
    """(patterns, upstream) in the order of the file; the last one takes the rest."""
    text = (DEPLOY / "Caddyfile").read_text()
    matchers = {name: paths.split() for name, paths in re.findall(r"^\t@(\w+) path (.+)$", text, re.MULTILINE)}
    handles = re.findall(
        r"^\thandle (?:@(\w+) )?\{\n\t\t(?:reverse_proxy ([\w-]+):8080 \{|respond (404))$", text, re.MULTILINE
    )
    assert len(handles) == text.count("handle ")
    return [(matchers[name] if name else ["*"], upstream or refused) for name, upstream, refused in handles]


def upstream_of(path: str) -> str:
    for patterns, upstream in proxied():
        for pattern in patterns:
            # Caddy: a star at the end alone takes any rest; between slashes it takes one part.
            whole = pattern.count("*") == 1 and pattern.endswith("*")
            if fnmatch.fnmatchcase(path, pattern) and (whole or pattern.count("/") == path.count("/")):
                return upstream
    raise AssertionError(path)


def routes() -> Iterator[tuple[str, str]]:
    for name in WEB:
        for module in SERVICES[name].routers:
            for route in importlib.import_module(module).router.routes:
                yield name, re.sub(r"\{\w+\}", "some-id", route.path)


def test_every_address_is_led_to_a_service_that_has_it() -> None:
    having: dict[str, set[str]] = {}
    for name, path in routes():
        having.setdefault(path, set()).add(name)
    assert {path: upstream_of(path) for path, names in having.items() if upstream_of(path) not in names} == {}


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/healthz"])
def test_what_is_for_those_inside_is_not_shown_outside(path: str) -> None:
    assert upstream_of(path) == "404"


# ------------------------------------------------------------------ image and units


def test_the_image_is_pinned_small_and_not_run_as_root() -> None:
    lines = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {step[0] for step in steps} <= known
    for word, rest in steps:
        if word == "FROM":
            assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+( AS \w+)?", rest)
        if word == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if word == "ENV":
            names = {pair.split("=")[0] for pair in rest.split()}
            assert {name for name in names if name.startswith(PREFIX)} <= ENVIRONMENT
    assert [rest for word, rest in steps if word == "USER"][-1] not in ("root", "0")
    assert "--require-hashes" in (DEPLOY / "Dockerfile").read_text()


@pytest.mark.parametrize("unit", ["caravan@.service", "caravan-migrate.service"])
def test_units_of_systemd(unit: str) -> None:
    path = DEPLOY / "systemd" / unit
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names keep their case
    parser.read(path)
    assert parser["Service"]["ExecStart"].endswith(("caravan serve %i", "caravan migrate"))
    assert parser["Service"]["User"] == "caravan"
    if unit == "caravan@.service":
        assert parser["Service"]["Restart"] == "always"
        named = set(re.findall(r"caravan@([a-z-]+)", path.read_text()))
        assert named == PROGRAMS


# ------------------------------------------------------------------ alerts and dashboard


def queries() -> dict[str, str]:
    found = {f"alert {rule['alert']}": rule["expr"] for rule in RULES}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    return found


NAMES_OF_SAMPLES = {
    name + suffix
    for name, (kind, *_labels) in exported().items()
    for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
}


@pytest.mark.parametrize(("where", "query"), queries().items(), ids=queries())
def test_every_query_reads_and_names_only_what_is_exported(where: str, query: str) -> None:
    promql_parser.parse(query)
    named = set(re.findall(r"\bcaravan_\w+|\bup\b", query))
    assert named, where
    assert named <= NAMES_OF_SAMPLES | {"up"}
    # Labels too: a label that nobody sets makes an alert that never comes.
    labels = {label for labels in exported().values() for label in labels[1:]} | {"le", "job"}
    assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)) <= labels
    for grouped in re.findall(r"\bby \(([^)]*)\)", query):
        assert set(grouped.replace(" ", "").split(",")) <= labels


def test_figures_of_the_platform_are_never_summed_over_processes() -> None:
    """Every process tells the same, so a sum would count them as often as there are processes."""
    for where, query in queries().items():
        for figure in PLATFORM:
            for before in re.findall(rf"(\w+)(?: by \([^)]*\))? ?\({figure.name}\b(?!_)", query):
                assert before in ("max", "min", "absent"), (where, figure.name)


@pytest.fixture(scope="module")
def promtool() -> str:
    """`make test` fetches it out of Debian's package, where it may."""
    found = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        lack = "needs promtool (Debian: in the package prometheus); the queries were read without it"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {lack}")
        pytest.skip(lack)
    return found


@pytest.mark.parametrize(("what", "path"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_promtool_finds_nothing_wrong(promtool: str, what: str, path: str) -> None:
    subprocess.run([promtool, "check", what, str(DEPLOY / "prometheus" / path)], check=True)


def test_the_rules_fire_when_they_should(promtool: str) -> None:
    subprocess.run([promtool, "test", "rules", str(Path(__file__).parent / "alerts.test.yml")], check=True)


def test_prometheus_asks_every_service() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["job_name"] == "caravan"
    assert set(job["static_configs"][0]["targets"]) == {f"{name}:8080" for name in PROGRAMS}
    assert config["rule_files"] == ["alerts.yml"]


# ------------------------------------------------------------------ the runbook


def anchors() -> dict[str, str]:
    """The sections of the runbook, by the anchor of their heading."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return {
        re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-"): text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_every_rule_has_a_severity_a_sentence_and_its_page(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor in anchors()


def test_every_alert_ends_in_one_command() -> None:
    pages = anchors()
    wanted = {f"alert-{name.lower()}" for name in NAMES}
    wanted |= {rule["annotations"]["runbook"].partition("#")[2] for rule in RULES}
    for anchor in wanted:
        last = pages[anchor].strip().split("\n\n")[-1]
        assert re.fullmatch(r"```\n(caravan|docker|systemctl) [^\n]+\n```", last), anchor
