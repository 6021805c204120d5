"""What is measured: each workload is the everyday recipe with a few keys set otherwise. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MATERIALS = ROOT / ".cache" / "peftctl" / "bench"
RECIPE = ROOT / "recipes" / "smollm2-lora.yaml"  # SmolLM2-135M, LoRA of rank 16 on every linear, 8 dialogues a step
PAIRS = ROOT / "recipes" / "smollm2-dpo.yaml"  # the same under DPO, 4 pairs a step
HELD_OUT = ROOT / ".cache" / "peftctl" / "dialogues" / "heldout.jsonl"

# the same for both sides: no rate that changes, for the two schedules count their steps differently
COMMON = (
    "data.validation=null",
    "train.schedule=constant",
    "train.warmup=0",
    "train.eval_every=null",
    "train.save_every=null",
)


class Workload(NamedTuple):
    """`sets`: overrides of the recipe, as `--set` takes them. `materials`: files it needs, see materials.py."""

    name: str
    about: str
    sets: tuple[str, ...] = ()
    materials: tuple[str, ...] = ()
    steps: int | None = None  # at most so many
    memory: int = 12_000_000_000  # bytes that the hungrier side may take
    recipe: Path = RECIPE
    held_out: bool = True  # whether a loss says anything: of random weights it does not

    def overrides(self, steps: int, device: str) -> list[str]:
        """All that is set for a run of `steps` steps."""
        return [*COMMON, *self.sets, f"train.max_steps={steps}", f"train.device={device}"]


def _material(name: str) -> str:
    return str(MATERIALS / name)


_LONG = (f"data.train={_material('rows-1024.jsonl')}", "data.max_length=1024", "train.batch_size=2")
_LLAMA = (f"model.name={_material('llama-1b')}",)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", "real dialogues, 8 a step, bf16"),
        Workload("short-unshared", "the same, common starts not shared", ("data.share_starts=false",)),
        Workload("fp32", "as short, in fp32", ("model.dtype=float32",)),
        Workload(
            "fp32-unshared",
            "as short-unshared, in fp32",
            ("model.dtype=float32", "data.share_starts=false"),
        ),
        Workload("long", "rows of 1,024 tokens, 2 a step", _LONG, ("rows-1024.jsonl",)),
        Workload("rank4", "as short, rank 4", ("method.rank=4", "method.alpha=8")),
        Workload("rank64", "as short, rank 64", ("method.rank=64", "method.alpha=128")),
        Workload("q_proj", "as short, LoRA on q_proj alone", ("method.target_modules=[q_proj]",)),
        Workload("dpo", "real preference pairs, 4 a step, bf16", recipe=PAIRS, held_out=False),
        Workload(
            "dpo-unshared", "the same, nothing shared", ("data.share_starts=false",), recipe=PAIRS, held_out=False
        ),
        Workload(
            "llama-1b",
            "random weights of a 1.1B Llama, 8 dialogues a step",
            _LLAMA,
            ("llama-1b",),
            steps=5,
            memory=16_000_000_000,
            held_out=False,
        ),
        Workload(
            "llama-1b-long",
            "the same on 8 rows of 1,024 tokens; for GPUs",
            (*_LLAMA, *_LONG, "train.batch_size=8"),
            ("llama-1b", "rows-1024.jsonl"),
            memory=60_000_000_000,
            held_out=False,
        ),
    )
}
DEFAULT = {"cpu": ("short", "short-unshared", "fp32", "fp32-unshared"), "cuda": ("llama-1b", "llama-1b-long")}


def available_memory() -> int | None:
    """Bytes that can be taken, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
