#!/usr/bin/env python3
"""Makes docs/host-report-lenient.schema.json anew: `python3 tests/lenient_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

DOCS: Final = Path(__file__).parent.parent / "docs"
STRICT: Final = DOCS / "host-report.schema.json"
LENIENT: Final = DOCS / "host-report-lenient.schema.json"
DESCRIPTION: Final = (
    "Any report of this agent and of a later one: fields may be added, and guests may have other"
    " types and statuses. Made from host-report.schema.json by tests/lenient_schema.py."
)
# What a later agent may change; types and required fields stay.
DROPPED: Final = {
    *("additionalProperties", "allOf", "dependentRequired", "if", "then"),
    *("enum", "maximum", "maxLength", "pattern"),
}


def make_lenient(schema: Any) -> Any:
    if isinstance(schema, list):
        return [make_lenient(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: make_lenient(value) for key, value in schema.items() if key not in DROPPED}
    if "enum" in schema:
        return {"type": "string", **kept}
    return kept


def main() -> None:
    strict = json.loads(STRICT.read_text("utf-8"))
    head = {
        "$id": strict["$id"].replace("host-report", "host-report-lenient"),
        "title": "Host report, lenient",
        "description": DESCRIPTION,
    }
    text = json.dumps({**make_lenient(strict), **head}, indent=2)
    LENIENT.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
