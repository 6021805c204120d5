"""What is measured: each workload is the everyday recipe with a few keys set otherwise. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MATERIALS = ROOT / ".cache" / "peftctl" / "bench"
RECIPE = ROOT / "recipes" / "smollm2-lora.yaml"  # SmolLM2-135M, LoRA of rank 16 on every linear, 8 dialogues a step
PAIRS = ROOT / "recipes" / "smollm2-dpo.yaml"  # the same under DPO
PAIRS_A_STEP = 4
HELD_OUT = ROOT / ".cache" / "peftctl" / "dialogues" / "heldout.jsonl"

WARM_UP = 2  # steps that are not counted: the first ones allocate memory and choose kernels
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
    pairs: int | None = None  # of a step, where rows are pairs
    again: bool = False  # whether the steps are those of two epochs, of which the second is measured

    def overrides(self, steps: int, device: str) -> list[str]:
        """All that is set for a run of `steps` steps."""
        twice = [f"data.limit={(self.pairs or 0) * (steps // 2)}"] if self.again else []
        return [*COMMON, *self.sets, *twice, f"train.max_steps={steps}", f"train.device={device}"]

    def warm(self, steps: int) -> slice:
        """The steps that count."""
        return slice(steps // 2, 2 * (steps // 2)) if self.again else slice(WARM_UP, steps)


def _material(name: str) -> str:
    return str(MATERIALS / name)


def _paired(name: str, about: str, *sets: str, again: bool = False) -> Workload:
    return Workload(name, about, sets, recipe=PAIRS, held_out=False, pairs=PAIRS_A_STEP, again=again)


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
        _paired("dpo", "real preference pairs, 4 a step, bf16"),
        _paired("dpo-unshared", "the same, nothing shared", "data.share_starts=false"),
        _paired("dpo-second", "a second epoch of pairs, whose reference is known", again=True),
        _paired("dpo-second-unshared", "the same, nothing shared", "data.share_starts=false", again=True),
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
# sharing on and off, in a first epoch and in a second; each list is measured beside the peer at its first
PREFERENCE = (("dpo", "dpo-unshared"), ("dpo-second", "dpo-second-unshared"))
DEFAULT = {"cpu": ("short", "short-unshared", "fp32", "fp32-unshared"), "cuda": ("llama-1b", "llama-1b-long")}


def available_memory() -> int | None:
    """Bytes that can be taken, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
