"""Our side alone: how its time grows with the job, and what each of its switches is worth. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.benchmarks.sides import OURS, Setting, ceiling, measured, run
from tests.benchmarks.workloads import MATERIALS, WORKLOADS, Workload

# what is taken out, each against the default: by a key of the recipe, or by name (without.py)
ABLATIONS = (
    "data.share_starts=false",
    "train.fuse=false",
    "train.pack_weights=true",
    "products",
    "groups",
    "labels",
    "chunks",
    "slope",
    "siblings",
    "mlp",
    "norm",
)
KNOWN = "train.cache_reference=false"  # of a second epoch
UNSHARED = "data.share_starts=false"  # so that every token is computed, and a token is a token in all rows
TOKENS = 2048  # of a step, where rows grow longer: as many rows as that makes


def _rows(length: int, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    name = f"rows-{length}.jsonl"
    sets = (f"data.train={MATERIALS / name}", f"data.max_length={length}", f"train.batch_size={count}", UNSHARED)
    return sets, (name,)


def _point(name: str, length: int, count: int) -> Workload:
    sets, materials = _rows(length, count)
    return Workload(name, "", sets, materials)


def _vocabulary(size: int) -> Workload:
    sets, materials = _rows(128, 8)
    config = f"vocabulary-{size}.json"
    own = (f"model.name={MATERIALS / config}", f"model.tokenizer={MATERIALS.parent / 'smollm2-135m'}")
    return Workload(f"{size:,}", "", (*sets, *own), (*materials, config), held_out=False)


SERIES: dict[str, tuple[Workload, ...]] = {
    "rows a step, of 128 tokens": tuple(_point(str(n), 128, n) for n in (2, 4, 8, 16, 32)),
    f"tokens a row, {TOKENS:,} a step": tuple(_point(str(n), n, TOKENS // n) for n in (64, 128, 256, 512, 1024)),
    "vocabulary, 4 layers": tuple(_vocabulary(n) for n in (49_152, 151_936)),
}


def prepare(workloads: Sequence[Workload], setting: Setting) -> None:
    """Make what the workloads need and is not there yet."""
    missing = dict.fromkeys(name for w in workloads for name in w.materials if not (MATERIALS / name).exists())
    if missing:
        print(f"making {', '.join(missing)}", flush=True)
        run(["-m", "tests.benchmarks.materials", *missing], setting.threads)


def growth(setting: Setting, rounds: int) -> None:
    """Time for each real token, against the number of rows, their length and the vocabulary.

    Beside it the operations that a token needs: attention's grow with the row, the head's with the vocabulary.
    """
    for title, points in SERIES.items():
        prepare(points, setting)
        taken = [[1 / measured(OURS, w, setting, loss=False).tokens_per_s for w in points] for _ in range(rounds)]
        needed = [sum(found["flops"]) / sum(found["tokens"]) for found in (ceiling(w, setting) for w in points)]
        print(f"\n{title:<32}{'us a token':>12}{'to the first':>14}{'in operations':>15}")
        found = [median(column) for column in zip(*taken, strict=True)]
        for workload, seconds, flops in zip(points, found, needed, strict=True):
            ratios = f"{seconds / found[0]:>14.2f}{flops / needed[0]:>15.2f}"
            print(f"{workload.name:<32}{1e6 * seconds:>12.0f}{ratios}", flush=True)


def ablation(names: Sequence[str], setting: Setting, rounds: int, wanted: Sequence[str] | None = None) -> None:
    """Each technique off against the default, in turn: tokens a second and peak memory, without to with.

    `wanted`: these switches alone.
    """
    print(f"\n{'workload':<20}{'switch':<32}{'speed':>8}{'memory':>8}  speeds")
    for workload in map(WORKLOADS.__getitem__, names):
        prepare([workload], setting)
        for switch in wanted or (*ABLATIONS, *([KNOWN] if workload.again else [])):
            sets, without = ([switch], None) if "=" in switch else ([], switch)
            pairs = []
            for _ in range(rounds):
                on = measured(OURS, workload, setting, loss=False)
                pairs.append((on, measured(OURS, workload, setting, sets, loss=False, without=without)))
            speeds = [off.tokens_per_s / on.tokens_per_s for on, off in pairs]
            peak = median(off.peak_bytes / on.peak_bytes for on, off in pairs)
            shown = " ".join(f"{ratio:.2f}" for ratio in speeds)
            print(f"{workload.name:<20}{switch:<32}{median(speeds):>8.2f}{peak:>8.2f}  {shown}", flush=True)
