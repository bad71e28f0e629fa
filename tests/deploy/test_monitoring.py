"""What is shipped for Prometheus and Grafana, without a server: rules, their tests, the dashboard, the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import dashboard_module

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules" / "metafleet.yml"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


@pytest.fixture(scope="module")
def dashboard() -> ModuleType:
    """The module that makes the dashboard."""
    return dashboard_module()


def promtool(*argv: object) -> str:
    finished = subprocess.run(["promtool", *map(str, argv)], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@needs_promtool
def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    assert "10 rules found" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("test", "rules", RULES.with_name("metafleet_test.yml"))


def test_the_committed_dashboard_is_the_one_that_is_made(dashboard: ModuleType) -> None:
    assert dashboard.PATH.read_text() == dashboard.dashboard(), "run python deploy/grafana/dashboard.py"


def test_panels_read_metrics_of_the_catalogue_and_say_what_they_show(dashboard: ModuleType) -> None:
    panels = [panel for panels in dashboard.ROWS.values() for panel in panels]
    read = {name for panel in panels for query in panel.queries for name in dashboard.names(query.expression)}
    ours = {name for name in read if name.startswith("metafleet_")}
    assert ours <= dashboard.known(), ours - dashboard.known()
    assert len({panel.title for panel in panels}) == len(panels)
    assert all(panel.meaning.endswith(".") and len(panel.meaning) > 20 and panel.unit for panel in panels)


def test_every_metric_is_drawn_somewhere_or_alerted_on(dashboard: ModuleType) -> None:
    """Counters that are only other panels' parts, and what describes the run, are told here."""
    queries = [query.expression for panels in dashboard.ROWS.values() for panel in panels for query in panel.queries]
    read = {name for text in (*queries, RULES.read_text()) for name in dashboard.names(text)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in read}
    unread = {name for name in dashboard.known() if re.sub(r"_(bucket|sum|count)$", "", name) not in families}
    assert unread == {"metafleet_commits_total"}


def test_the_dashboard_is_what_grafana_takes(dashboard: ModuleType) -> None:
    board: dict[str, Any] = json.loads(dashboard.PATH.read_text())
    assert board["uid"] == "metafleet" and board["title"] == "Metafleet"
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "run", "worker"]
    drawn = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in drawn:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_every_alert_has_its_paragraph_in_the_runbook() -> None:
    alerts = re.findall(r"alert: (\w+)", RULES.read_text())
    anchors = re.findall(r"runbook: docs/runbook.md#(\w+)", RULES.read_text())
    assert anchors == [name.lower() for name in alerts]
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert headings == alerts
    tested = RULES.with_name("metafleet_test.yml").read_text()
    assert all(f"alertname: {name}" in tested for name in alerts)


def test_the_panels_that_the_documents_name_are_there(dashboard: ModuleType) -> None:
    titles = {panel.title for panels in dashboard.ROWS.values() for panel in panels}
    for name in ("runbook.md", "deploy.md"):
        named = set(re.findall(r'"([A-Z][a-z][^"]*)"', (ROOT / "docs" / name).read_text().replace("\n", " ")))
        assert named and named <= titles


def test_the_document_makes_a_rule_for_the_operator_of_the_same_alerts() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    (lines,) = re.findall(r"^    (\(printf 'apiVersion.*?\)) \| kubectl apply -f -$", text, re.MULTILINE | re.DOTALL)
    made = yaml.safe_load(subprocess.run(["sh", "-c", lines], cwd=ROOT, capture_output=True, check=True).stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["metadata"]["namespace"] == "metafleet"
    assert made["spec"] == yaml.safe_load(RULES.read_text())
