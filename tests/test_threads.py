"""OpenMP's threads are bound before torch is there, where nobody has said otherwise, and nothing else is."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from peftctl import launch, threads

FOUR = [2, 3, 5, 7]
BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binding needs Linux")


def worker(rank: int, each: int, count: int = 2) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(each)}


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "4"}, {"MKL_NUM_THREADS": "9"}, {"OMP_DYNAMIC": "1"}])
def test_as_many_threads_as_processors_are_bound(environment: dict[str, str]) -> None:
    assert threads.settings(environment, FOUR) == BOUND


@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "2"}],
)
def test_fewer_threads_are_not(environment: dict[str, str]) -> None:
    assert threads.settings(environment, FOUR) == {} == threads.settings({}, [0])


@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"])
def test_what_the_user_has_set_is_left_alone(name: str) -> None:
    assert threads.settings({name: ""}, FOUR) == {}


def test_processes_share_the_processors_out() -> None:
    places = [threads.settings(worker(rank, 2), FOUR)["OMP_PLACES"] for rank in range(2)]
    assert places == ["{2},{3}", "{5},{7}"]
    assert threads.settings(worker(0, 1), FOUR) == {}, "two processes of one thread leave two processors free"
    assert threads.settings(worker(1, 1, 4), FOUR) == {}, "one thread waits for no other"


def test_the_processes_of_a_run_get_shares_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []

    class Started:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str], **rest: Any) -> None:
            given.append(env)

        def poll(self) -> int:
            return 0

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "usable", lambda: FOUR)
    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    assert launch.launch(2, ["train", "recipe.yaml"]) == 0
    assert [threads.settings(own, FOUR).get("OMP_PLACES") for own in given] == ["{2},{3}", "{5},{7}"]


LOADED = """
import json, os
from peftctl import threads
from peftctl.imports import importing
before = threads.usable()
with importing():
    import torch
torch.randn(1 << 22).exp_().sum()
after, variables = threads.usable(), sorted(name for name in os.environ if name in ("OMP_PROC_BIND", "OMP_PLACES"))
with threads.bind_main("cpu"):
    computing = threads.usable()
with threads.bind_main("cuda"):
    elsewhere = threads.usable()
others = [sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
found = {"before": before, "after": after, "computing": computing, "elsewhere": elsewhere, "end": threads.usable()}
print(json.dumps(found | {"others": others, "variables": variables, "threads": torch.get_num_threads()}))
"""


def loaded(own: Mapping[str, str]) -> Any:
    """What a process that imports torch as the commands do says of its threads; `own`: variables of its user."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", LOADED], env=environment | own, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def cores() -> list[list[int]]:
    """The usable processors, those of one core together: two of its threads are two processors to the system."""
    usable = set(threads.usable())
    found = set()
    for number in usable:
        file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings")
        mask = int(file.read_text("ascii").replace(",", ""), 16) if file.is_file() else 1 << number
        found.add(tuple(one for one in sorted(usable) if mask >> one & 1))
    return [list(one) for one in sorted(found)]


@linux
@pytest.mark.skipif(len(cores()) < 2, reason="one core leaves nothing to choose")
def test_each_thread_has_a_core_while_it_computes() -> None:
    found = loaded({})
    everywhere = found["before"]
    assert found["after"] == found["elsewhere"] == found["end"] == everywhere
    assert found["computing"] in cores() and found["computing"] != everywhere
    bound = [own for own in found["others"] if own != everywhere]
    assert len(bound) >= found["threads"] - 1, "the library was loaded before it was told"
    assert all(own in cores() for own in bound)
    if found["threads"] == len(cores()):  # not where a core has two threads, which share it then
        assert not any(own == found["computing"] for own in bound[: found["threads"] - 1])
    assert found["variables"] == [], "a process that is started later would crowd on the same processors"


@linux
@pytest.mark.parametrize("own", [{"OMP_PROC_BIND": "false"}, {"OMP_NUM_THREADS": "1"}])
def test_whoever_says_otherwise_has_free_threads(own: dict[str, str]) -> None:
    found = loaded(own)
    assert found["computing"] == found["after"] == found["before"]
    assert all(place == found["before"] for place in found["others"])
    assert found["variables"] == [name for name in own if name == "OMP_PROC_BIND"]
