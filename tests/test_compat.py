"""The report as it was before the extras `details` and `tasks`: still taken, still sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import lab
from examples import hub as example
from support import make_collector, make_report

FOLDER: Final = Path(__file__).parent / "compat" / "before-details"
SCHEMA: Final = json.loads((FOLDER / "host-report.schema.json").read_text("utf-8"))
REPORTS: Final = sorted(set(FOLDER.glob("*.json")) - {FOLDER / "host-report.schema.json"})


def problems(report: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)]


def test_there_is_a_report_of_each_kind() -> None:
    names = {"backups", "minimal", "qemu", "storage", "unknown-guest"}
    assert {path.stem for path in REPORTS} == names


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_hub_takes_a_report_of_an_earlier_agent(path: Path) -> None:
    body = path.read_bytes()
    assert problems(json.loads(body)) == []
    assert example.parse_report(body) == json.loads(body)


@pytest.mark.parametrize("is_empty", [True, False], ids=["nothing-known", "simulated-node"])
def test_without_extras_the_report_is_what_it_was(is_empty: bool) -> None:
    if is_empty:
        report = make_report()
    else:
        with lab.SimulatedNode(None) as node:
            report = make_collector(node).collect()
    assert problems(json.loads(report.to_json())) == []
