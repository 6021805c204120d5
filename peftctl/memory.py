"""How much memory this process may still take. Torch-free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container: version 2, and the version 1 below it
GROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping: what the system has, or a container's limit leaves; None if unknown."""
    return min((size for size in (_system(), _group()) if size is not None), default=None)


def _system() -> int | None:
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text("utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group() -> int | None:
    for limit, usage in GROUP_FILES:
        with suppress(OSError, ValueError):  # "max" is no number: there is no limit
            return max(0, int((GROUP / limit).read_text()) - int((GROUP / usage).read_text()))
    return None
