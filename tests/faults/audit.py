"""What pip-audit knows against the installed packages, in lines; ends with 1 where it knows a hole, or nothing at all.

Called with pip-audit's path, which has its own environment: python tests/faults/audit.py .venv-audit/bin/pip-audit
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from typing import Any


def told(document: dict[str, Any]) -> tuple[list[str], int]:
    """Lines about an answer of pip-audit's, and the exit code."""
    packages = document["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return [f"nothing is known: the advisories could not be reached for any of {len(packages)} packages"], 1
    lines = [
        f"{package['name']} {package['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'none'}"
        for package in audited
        for hole in package["vulns"]
    ]
    left = [package["name"] for package in packages if "skip_reason" in package]
    summary = f"{len(audited)} packages audited, {len(lines)} holes known"
    return [*lines, summary + (f"; not audited: {', '.join(left)}" if left else "")], int(bool(lines))


def main(program: str) -> int:
    place = sysconfig.get_paths()["purelib"]
    command = [program, "--path", place, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        lines, code = told(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        lines, code = [f"nothing is known: pip-audit ended with {done.returncode}: {reason}"], 1
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
