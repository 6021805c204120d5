"""A data set of a hub, from a server on the loopback interface: fetched once, used offline, refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hub, runs

ROWS = [{"prompt": f"question {number}?", "completion": f" answer {number}"} for number in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a repository of a data set holds: two splits, and a second config."""
    path = tmp_path_factory.mktemp("set")
    (path / "data").mkdir()
    (path / "more").mkdir()
    (path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "data" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + '{"prompt": "x", "completion": ""}\n')
    (path / "more" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    splits = [f"{{split: {name}, path: data/{name}.jsonl}}" for name in ("train", "test")]
    default = f"{{config_name: default, data_files: [{', '.join(splits)}], default: true}}"
    configs = f"[{default}, {{config_name: more, data_files: more/train.jsonl}}]"
    (path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    return path


CHECK = """
import json, sys
from peftctl import commands
from peftctl.errors import PeftctlError

for source in json.loads(sys.argv[2]):
    try:
        found = commands.validate(sys.argv[1], [f"data.train={source}"], False, 0)
    except PeftctlError as error:
        found = str(error)
    print(json.dumps(found))
"""


def validated(tmp_path: Path, endpoint: str, *sources: str, offline: bool = False):
    """What `validate` says of each source, in a process of its own: the library reads its settings once."""
    contents = runs.document(data={"validation": None}, train={"eval_every": None})
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", CHECK, str(runs.written(tmp_path / "run", contents)), json.dumps(sources)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


WRONG = {
    "{hub: owner/set, split: test}": "owner/set:test:row 2: completion is empty",
    "{hub: owner/set, split: tset}": "data set owner/set cannot be read: Unknown split",
    "{hub: owner/set, config: none}": "BuilderConfig 'none' not found. Available: ['default', 'more']",
    "{hub: owner/none}": "data set owner/none is not on the hub: check the name",
}
OTHER = "f" * 40
OFFLINE = {
    "{hub: owner/none}": "data set owner/none is not on this machine and the hub cannot be reached",
    f"{{hub: owner/set, config: default, revision: {OTHER}}}": f"only, not of {OTHER}: connect",
}


def test_a_split_is_fetched_once_and_used_offline(tmp_path, folder):
    good = ["{hub: owner/set}", "[{hub: owner/set, config: more}, {hub: owner/set}]"]
    with hub.serving("owner/set", folder, "datasets") as server:
        plain, several, *wrong = validated(tmp_path, server.endpoint, *good, *WRONG)
        assert (plain["rows"], plain["name"], plain["kind"]) == (6, "owner/set:train", "completion")
        assert isinstance(several, dict), several
        assert several["rows"] == 8 and any(path.endswith("data/train.jsonl") for path in server.asked)
        assert all(said in found.splitlines()[0] for found, said in zip(wrong, WRONG.values(), strict=True)), wrong
        server.asked.clear()
        again, *wrong = validated(
            tmp_path, server.endpoint, "{hub: owner/set, config: default}", *OFFLINE, offline=True
        )
        assert again == plain and not server.asked
        assert all(said in found for found, said in zip(wrong, OFFLINE.values(), strict=True)), wrong


def test_a_data_set_with_a_script_is_refused_and_nothing_of_it_is_run(tmp_path):
    folder, ran = tmp_path / "scripted", tmp_path / "ran"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with hub.serving("owner/set", folder, "datasets") as server:
        [told] = validated(tmp_path, server.endpoint, "{hub: owner/set}")
    assert told == "data set owner/set comes with a script of its own, which is never run; name its files as path"
    assert not ran.exists()
