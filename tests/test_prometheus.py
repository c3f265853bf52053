"""Prometheus's own tool on the alert rules, and on what the example hub serves.

It comes with Debian's package prometheus. With REQUIRE_PROMTOOL set, as in CI, it must be there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from test_example_hub import HOSTILE, make_full_document, run_hub

ROOT: Final = Path(__file__).parent.parent


def run_promtool(*arguments: str, text: str = "") -> tuple[int, str]:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert "REQUIRE_PROMTOOL" not in os.environ, "apt install prometheus"
        pytest.skip("needs promtool: apt install prometheus")
    command = [promtool, *arguments]
    ended = subprocess.run(
        command, input=text, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_rules_raise_the_alerts_that_they_should() -> None:
    status, said = run_promtool("test", "rules", "tests/prometheus-rules-test.yml")
    assert status == 0, said


def test_metrics_have_no_fault(tmp_path: Path) -> None:
    with run_hub(tmp_path) as running:
        document = make_full_document()
        document["guests"][0]["name"] = HOSTILE
        assert running.post(document) == 200
        metrics = running.get("/metrics")
    assert metrics.count("# TYPE") == 17
    assert run_promtool("check", "metrics", text=metrics) == (0, "")
