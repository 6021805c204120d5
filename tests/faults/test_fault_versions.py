"""The versions below which a library we read strangers' files with has a hole that is known."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.faults.audit import told
from tests.faults.conftest import Seen

ROOT = Path(__file__).parent.parent.parent
FLOORS = {  # the first version without it
    "torch": ("2.10", "CVE-2026-24747: memory corruption in the unpickler, even of weights_only"),
    "transformers": ("5.3", "CVE-2026-4372: a config runs code without trust_remote_code"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a way out of the sandbox by |attr"),
    "pyyaml": ("5.4", "CVE-2020-14343: full_load runs code"),
}


def required() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    found = [Requirement(word) for word in re.findall(r'"([^"]+)"', block[1])]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.fault(27, 28, 34)
@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_hole_is_installed_or_allowed(name: str, seen: Seen) -> None:
    floor, hole = FLOORS[name]
    assert Version(version(name)) >= Version(floor), hole
    least = [Version(one.version) for one in required()[name].specifier if one.operator == ">="]
    assert least and least[0] >= Version(floor), hole
    seen(f"{name} {version(name)}, at least {floor}")


def test_an_audit_that_reached_nobody_is_no_audit() -> None:
    unreached = {"name": "torch", "skip_reason": "Dependency not found"}
    assert told({"dependencies": [unreached] * 3}) == (
        ["nothing is known: the advisories could not be reached for any of 3 packages"],
        1,
    )


def test_an_audit_tells_each_hole_and_what_it_did_not_see() -> None:
    sound = {"name": "rich", "version": "15", "vulns": []}
    broken = {"name": "torch", "version": "2.9", "vulns": [{"id": "CVE-2026-24747", "fix_versions": ["2.10.0"]}]}
    assert told({"dependencies": [sound]}) == (["1 packages audited, 0 holes known"], 0)
    assert told({"dependencies": [sound, broken, {"name": "own", "skip_reason": "not on an index"}]}) == (
        ["torch 2.9: CVE-2026-24747, fixed in 2.10.0", "2 packages audited, 1 holes known; not audited: own"],
        1,
    )
