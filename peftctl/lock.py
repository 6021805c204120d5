"""One writer of a folder at a time, by a file that names its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peftctl import storage
from peftctl.errors import InputError

NAME = "lock"


def check(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, at once and without a trace. Raises InputError."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if "\0" in str(folder):
        raise InputError(f"output: {str(folder)!r} cannot be made: no name may hold that")
    if not place.is_dir():
        raise InputError(f"output: {str(folder)!r} cannot be made: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output: {str(folder)!r} cannot be written: {place} is read-only, or another user's")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock. A lock whose process is gone is taken over. Raises InputError."""
    lock = folder / NAME
    _make(folder)
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    with _one_at_a_time(folder):
        if not _created(lock, own):
            holder = _read(lock)
            if holder != own and _alive(holder):
                raise InputError(
                    f"{folder} is being written by process {holder['pid']} on {holder['host']}; "
                    f"if that is not so, remove {lock}"
                )
            storage.write_file(lock, json.dumps(own).encode())
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of those that find one stale lock, each judges it after the other has taken it over."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise InputError(
            f"output: {str(folder)!r} cannot be made: {getattr(error, 'strerror', None) or error}"
        ) from error


def _created(lock: Path, own: dict[str, Any]) -> bool:
    """Whether the lock was free; of two that ask at once, one is told so."""
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(json.dumps(own))
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"output: {lock} cannot be written: {error.strerror}") from error
    return True


def _read(lock: Path) -> dict[str, Any]:
    try:
        found = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _alive(holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lock still runs; on another machine nobody can tell, so yes."""
    pid, host = holder.get("pid"), holder.get("host")
    if not isinstance(pid, int) or pid < 1 or not isinstance(host, str):
        return False  # half written, when its process died
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    # numbers are given anew, soon after the machine was started again
    return holder.get("started") in (None, _started(pid))


def _started(pid: int) -> str | None:
    """When a process that runs began, in words that no other of its number shares; None where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()  # after the name, which may hold anything
    return None if state == "Z" else f"{boot} {numbers[18]}"  # Z: it has ended, and nobody has asked how
