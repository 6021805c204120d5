"""Which fault was seen how: gathered from the tests marked `fault(number)`, printed as a table."""

from __future__ import annotations

from collections import defaultdict

import pytest
from rich.console import Console
from rich.table import Table

from tests.faults.catalog import FAULTS, Fault

COLOURS = {"pass": "green", "unseen": "yellow", "fail": "bold red"}


class Gathered:
    """A plugin of pytest: what each test about a fault came to."""

    def __init__(self) -> None:
        self.seen: dict[int, list[str]] = defaultdict(list)
        self.failed: dict[int, list[str]] = defaultdict(list)
        self.passed: dict[int, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = report.user_properties  # what a test says of itself, also from a worker's process
        for number in (number for name, number in told if name == "fault"):
            if report.failed:
                self.failed[number].append(report.nodeid.rpartition("::")[2])
            elif report.when == "call" and report.passed:
                self.passed[number] += 1
                self.seen[number] += [str(text) for name, text in told if name == "seen"]

    def verdict(self, fault: Fault) -> tuple[str, str]:
        """What was seen, and pass, fail or unseen."""
        number = fault.number
        if self.failed[number]:
            return f"failed: {', '.join(self.failed[number][:3])}", "fail"
        if not self.passed[number]:
            return "no test was run", "unseen"
        count = self.passed[number]
        seen = self.seen[number][0] if self.seen[number] else "as expected"
        return f"{seen} ({count} test{'s' * (count > 1)})", "pass"

    def green(self) -> bool:
        """Whether all faults were seen, and every test about one passed."""
        return all(self.verdict(fault)[1] == "pass" for fault in FAULTS)

    def show(self, console: Console) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, width in (("", 2), ("fault", 34), ("expected", 44), ("seen", 58), ("", 7)):
            table.add_column(name, width=width)
        verdicts = [(fault, *self.verdict(fault)) for fault in FAULTS]
        for fault, seen, word in verdicts:
            cells = (str(fault.number), fault.name, fault.expected, seen)
            table.add_row(*(cell.replace("[", r"\[") for cell in cells), f"[{COLOURS[word]}]{word}[/]")
        console.print(table)
        words = [word for _, _, word in verdicts]
        console.print(", ".join(f"{words.count(word)} {word}" for word in COLOURS if word in words))
