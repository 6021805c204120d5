"""How much memory is free: by the system, within a container's limit, and where neither is known."""

from pathlib import Path

import pytest

from peftctl import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    return tmp_path


def test_without_a_limit_it_is_what_the_system_has(system: Path) -> None:
    assert memory.available_bytes() == 1000 * 1024
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("5\n")
    assert memory.available_bytes() == 1000 * 1024


@pytest.mark.parametrize("names", memory.GROUP_FILES)
def test_a_containers_limit_counts(names: tuple[str, str], system: Path) -> None:
    for name, size in zip(names, (500_000, 100_000), strict=True):
        (system / name).parent.mkdir(exist_ok=True)
        (system / name).write_text(f"{size}\n")
    assert memory.available_bytes() == 400_000


def test_where_the_system_keeps_no_such_file_it_is_asked(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "meminfo").unlink()
    monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.available_bytes() == 40960

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert memory.available_bytes() is None
