"""Files and folders that are there whole or not at all: written aside, synced, renamed, and verified by a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.errors import FormatError, SaveError

MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".tmp-"  # being written or removed; of no worth after a crash
ASIDE = ".old-"  # what a rename is about to replace; put back after a crash

_LARGEST_MANIFEST = 4 << 20  # bytes; ours have some ten entries

Content = bytes | Callable[[Path], None]  # of a file: its bytes, or what writes it at a path


class Entry(NamedTuple):
    size: int
    sha256: str


class Manifest(NamedTuple):
    format: int
    files: dict[str, Entry]


def write_file(target: Path, data: bytes) -> None:
    """Replace a file in one instant. Raises SaveError; what was there before is then still there."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, data)
        os.replace(temporary, target)
        sync(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _failed(target, error, len(data)) from error


def write_folder(target: Path, files: Mapping[str, Content], expected: int = 0) -> Manifest:
    """Write a folder of files and its manifest beside `target`, then rename it there, replacing what was there.

    `expected`: bytes that will be needed, for the message when the disk is full. Raises SaveError; `target` is then
    as it was.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest = Manifest(FORMAT, {name: _write(temporary / name, content) for name, content in files.items()})
        _write(temporary / MANIFEST, _encode(manifest))  # last: a folder without it is not whole
        sync(temporary)
        _rename(temporary, target)
        sync(target.parent)
    except OSError as error:
        needed = max(expected, _size(temporary))
        shutil.rmtree(temporary, ignore_errors=True)
        raise _failed(target, error, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def seal(folder: Path, names: Sequence[str]) -> None:
    """Write the manifest of these files of a folder, which `verify` checks. Raises OSError."""
    entries = {name: Entry((folder / name).stat().st_size, _sha256(folder / name)) for name in names}
    (folder / MANIFEST).write_bytes(_encode(Manifest(FORMAT, entries)))


def publish(temporary: Path, target: Path) -> None:
    """Give a folder that was filled aside its name, replacing what was there, once all of it is on the disk.

    Raises SaveError; `target` is then as it was.
    """
    try:
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        _rename(temporary, target)
        sync(target.parent)
    except OSError as error:
        raise _failed(target, error, _size(temporary)) from error


def verify(folder: Path) -> Manifest:
    """Check that every file of a folder is as its manifest says. Raises FormatError with the file's name."""
    manifest = _read_manifest(folder / MANIFEST)
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{path}: missing; {MANIFEST} lists it with {entry.size} bytes")
        if path.stat().st_size != entry.size:
            raise FormatError(f"{path}: {path.stat().st_size} bytes found, {entry.size} expected")
        found = _sha256(path)
        if found != entry.sha256:
            raise FormatError(f"{path}: damaged: sha256 {found[:16]}... found, {entry.sha256[:16]}... expected")
    return manifest


def remove(folder: Path) -> None:
    """Remove a folder, if it is there, so that no half of it is ever seen under its name. Raises SaveError."""
    if folder.is_symlink():
        folder.unlink()  # what it leads to is not ours
    if not folder.exists():
        return
    doomed = folder.with_name(f"{TEMPORARY}gone-{folder.name}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise SaveError(f"cannot remove {folder}: {error.strerror}") from error


def tidy(parent: Path) -> None:
    """Clean up after a crash: drop what was half written, put back what was about to be replaced."""
    for leftover in parent.glob(f"{ASIDE}*"):
        target = leftover.with_name(leftover.name.removeprefix(ASIDE))
        if target.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            os.replace(leftover, target)
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _write(path: Path, content: Content) -> Entry:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    sync(path)
    return Entry(path.stat().st_size, _sha256(path))


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    aside = target.with_name(f"{ASIDE}{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)  # a folder cannot replace one that is not empty
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _failed(target: Path, error: OSError, needed: int) -> SaveError:
    place = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    what = error.strerror or str(error)
    return SaveError(f"cannot write {target}: {what}; {needed:,} bytes needed, {free:,} free at {place}")


def _encode(manifest: Manifest) -> bytes:
    files = {name: entry._asdict() for name, entry in manifest.files.items()}
    return (json.dumps({"format": manifest.format, "files": files}, indent=2) + "\n").encode()


def _read_manifest(path: Path) -> Manifest:
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent}: no such folder")
    if not path.is_file():
        raise FormatError(f"{path}: missing; the folder was not written whole")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise FormatError(f"{path}: {path.stat().st_size} bytes found, a manifest has at most {_LARGEST_MANIFEST}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    return _decode(document, path)


def _decode(document: Any, path: Path) -> Manifest:
    found = document.get("format") if isinstance(document, dict) else None
    if type(found) is not int or found < 1:
        raise FormatError(f"{path}: not a manifest: a format number of {FORMAT} expected, {found!r} found")
    if found > FORMAT:
        raise FormatError(f"{path}: format {found} found, this version reads up to {FORMAT}; update peftctl")
    try:
        files = {name: Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in document["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"{path}: not a manifest: each file needs a size and a sha256") from None
    for name in files:
        if Path(name).name != name or name in ("..", MANIFEST):
            raise FormatError(f"{path}: the file name {name!r} leads out of the folder")
    return Manifest(found, files)
