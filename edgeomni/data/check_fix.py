"""A cleaned list of the samples that can be used, and beside it what was left out, each with its reasons."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..outputs import check_file, write_file
from .check import CheckReport, Finding
from .native import write_jsonl


def removed_path(out: str | os.PathLike[str]) -> Path:
    """Where the list of what was left out goes: beside the cleaned list."""
    return Path(f"{os.fspath(out)}.removed.jsonl")


def check_targets(out: str | os.PathLike[str], force: bool = False) -> None:
    """Raises UsageError where `write_fixed` would refuse to write."""
    check_file(out, force)
    check_file(removed_path(out), force)


def write_fixed(
    report: CheckReport, out: str | os.PathLike[str], *, strict: bool = False, force: bool = False
) -> tuple[int, int]:
    """Writes the samples that can be used to `out`, as EdgeOmni's own JSON Lines; returns how many stayed and went.

    What was left out goes to `removed_path`, one JSON object to a line: "where", and "why" with the kind and text of
    each finding. It is written first, so that nothing is ever missing from a list without its reason. Raises
    UsageError and OSError as `outputs.write_file` does.
    """
    bad = report.unusable(strict)
    removed = list(_removed(report, bad))
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in removed)
    write_file(removed_path(out), lines.encode("utf-8", "replace"), force)
    write_jsonl((sample for i, sample in enumerate(report.samples) if i not in bad), out, force)
    return len(report.samples) - len(bad), len(removed)


def _removed(report: CheckReport, bad: dict[int, list[Finding]]) -> Iterator[dict[str, Any]]:
    for finding in report.findings:
        if finding.index is None:
            yield {"where": finding.where, "why": [_why(finding)]}
    for index, findings in bad.items():
        yield {"where": report.samples[index].where, "why": [_why(finding) for finding in findings]}


def _why(finding: Finding) -> dict[str, str]:
    return {"kind": finding.kind, "what": finding.what}
