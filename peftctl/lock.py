"""One writer of a folder at a time, by a file that names its process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftctl import storage
from peftctl.errors import InputError

NAME = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock. A lock whose process is gone is taken over. Raises InputError."""
    lock = folder / NAME
    _make(folder)
    own = {"pid": os.getpid(), "host": socket.gethostname()}
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
        return True
    return True
