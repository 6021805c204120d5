"""A processor with fewer instructions than this one does the same work another way, and says so in one line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import run
from peftctl.kernels.matrix import packable
from peftctl.plan import Options
from tests import runs

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
IN_VAIN = {
    "auto": "train.pack_weights has no effect: matrices stored in bfloat16 are widened when they are multiplied",
    "bfloat16": "train.pack_weights has no effect: no frozen bfloat16 matrix can be packed on this cpu",
}


def document(dtype: str, compute_dtype: str = "auto") -> dict[str, Any]:
    train = {"pack_weights": True, "compute_dtype": compute_dtype}
    return runs.document("lora", model={"dtype": dtype}, train=train)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="there is no such processor to be played")
@pytest.mark.parametrize("compute_dtype", IN_VAIN)
def test_on_one_with_avx2_alone_a_run_packs_nothing_and_says_so_once(compute_dtype: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = runs.written(output, document("bfloat16", compute_dtype))
    environment = os.environ | AVX2 | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.CONFIGS.parent)}
    command = [sys.executable, "-m", "peftctl.cli", "train", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count(IN_VAIN[compute_dtype]) == 1 == done.stderr.count("pack_weights")
    assert json.loads((output / "run.json").read_text())["choices"]["dtype"] == "bfloat16"
    assert runs.done(output) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_matrices_are_packed_nothing_is_said(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(runs.loaded(tmp_path / "run", document(dtype)), Options(verify=False))
    can = packable(torch.zeros(4, 4, dtype=getattr(torch, dtype)))
    assert ("train.pack_weights" in capsys.readouterr().err) is not can
