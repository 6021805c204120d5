"""Published parameter counts beside ours: `python -m tests.conformance`, or `make conformance`, prints the table.

Every expectation is the paper's own formula, written by hand. Figures that do not follow from it are told as such.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from peftctl import base as bases
from peftctl import methods
from peftctl.counting import Counts, count
from peftctl.errors import PeftctlError
from peftctl.model import skeleton
from peftctl.task import Task

ROOT = Path(__file__).parents[1]
BERT_BASE, BERT_LARGE = 109_482_240, 335_141_888  # of the encoders with their pooler


class Row(NamedTuple):
    """A published count. `expected` is what its formula gives; `why` says what is wrong with a figure that differs."""

    source: str  # paper (arXiv number) or page
    base: str  # a file of configs/models
    called: str  # the method in the source's words
    method: dict[str, Any]  # the recipe's block
    published: str  # as printed: 0.3M, 2.1%, 524,288, or 3.4 MB of a file with four bytes each
    expected: int
    why: str = ""
    inside: str = ""  # only what lies below this path: an encoder without the head for its language model
    of: int = 0  # of what a published percentage is a part
    labels: int = 0  # of a classification head that is counted as well

    def counted(self) -> int:
        counts = counts_of(self.base, self.method, labels=self.labels)
        return sum(n for path, n in counts.places.items() if path.startswith(self.inside))

    def matches(self, counted: int) -> bool:
        """Whether a count, rounded as the published figure is, gives that figure."""
        text = self.published.replace(",", "")
        digits = len(text.rstrip(" MB%").partition(".")[2])
        if text.endswith(" MB"):
            return f"{4 * counted / 2**20:.{digits}f} MB" == text
        if text.endswith("%"):
            return f"{100 * counted / self.of:.{digits}f}%" == text
        return f"{counted / 1e6:.{digits}f}M" == text if text.endswith("M") else str(counted) == text


class Total(NamedTuple):
    """Parameters of a base. `beside` is what the published figure has and our language model has not."""

    base: str
    published: str
    expected: int
    beside: int = 0
    inside: str = ""
    why: str = ""

    def counted(self) -> int:
        table = skeleton(bases.resolve(str(path_of(self.base))))
        return table._replace(modules=tuple(m for m in table.modules if m.path.startswith(self.inside))).parameters()


def lora(rank: int, *targets: str) -> dict[str, Any]:
    return {"name": "lora", "rank": rank, "target_modules": list(targets) or "all-linear"}


def bottleneck(preset: str, width: int, *norms: str) -> dict[str, Any]:
    return {"name": "bottleneck", "preset": preset, "width": width, "save_modules": list(norms) or None}


def adapters(count: int, hidden: int, width: int) -> int:
    """Two matrices and two biases each."""
    return count * (2 * hidden * width + width + hidden)


def head(hidden: int, labels: int) -> int:
    """RoBERTa's: a linear of the model's width and one to the labels, each with a bias."""
    return hidden * (hidden + 1) + labels * (hidden + 1)


LORA, HOULSBY, BITFIT = "2106.09685", "1902.00751", "2106.10199"
LORA_PAGE = "microsoft/LoRA"  # the repository's page, which counts the heads and tells its files' sizes
GPT2_QV = ("c_attn.q", "c_attn.v")
BERT_QV = ("query", "value")

# an encoder's pooler is a linear of its width with a bias
TOTALS = [
    Total("bert-base", "109,482,240", BERT_BASE, beside=768 * 769, inside="bert."),
    Total("bert-large", "335,141,888", BERT_LARGE, beside=1024 * 1025, inside="bert."),
    Total("roberta-base", "124,055,040", 124_055_040, inside="roberta."),
    Total("roberta-base", "124,645,632", 124_645_632, beside=768 * 769, inside="roberta."),
    Total("roberta-large", "355,359,744", 355_359_744, beside=1024 * 1025, inside="roberta."),
    Total("gpt2", "124,439,808", 124_439_808),
    Total("gpt2-medium", "354,823,168", 354_823_168),
    Total("gpt2-large", "774,030,080", 774_030_080),
    Total("gpt2-xl", "1,557,611,200", 1_557_611_200),
    Total("llama-3.2-1b", "1,235,814,400", 1_236_338_688 - 524_288),
    Total("opt-6.7b", "6,658,473,984", 6_666_862_592 - 8_388_608),
    Total(
        "gpt3",
        "175,255.8M",
        96 * (12 * 12288**2 + 13 * 12288) + 2 * 12288 + (50257 + 2048) * 12288,
        why="96 layers of 12,288 with GPT-2's 50,257 tokens and 2,048 positions give 174,604.3M",
    ),
]

ROWS = [
    Row(LORA, "roberta-base", "LoRA r8 q,v", lora(8, *BERT_QV), "0.3M", 2 * 12 * 8 * 1536),
    Row(LORA, "roberta-large", "LoRA r8 q,v", lora(8, *BERT_QV), "0.8M", 2 * 24 * 8 * 2048),
    Row(
        LORA_PAGE,
        "roberta-base",
        "LoRA r8 q,v, head",
        lora(8, *BERT_QV),
        "0.8M",
        2 * 12 * 8 * 1536 + head(768, 2),
        "rounded down: 0.89M",
        labels=2,
    ),
    Row(
        LORA_PAGE,
        "roberta-base",
        "LoRA r8 q,v, head",
        lora(8, *BERT_QV),
        "3.4 MB",
        2 * 12 * 8 * 1536 + head(768, 2),
        labels=2,
    ),
    Row(
        LORA_PAGE,
        "roberta-large",
        "LoRA r8 q,v, head",
        lora(8, *BERT_QV),
        "7.1 MB",
        2 * 24 * 8 * 2048 + head(1024, 2),
        "its numbers take 7.0 MB",
        labels=2,
    ),
    Row(LORA, "gpt3", "LoRA r1 q,v", lora(1, *GPT2_QV), "4.7M", 2 * 96 * 1 * 24576),
    Row(LORA, "gpt3", "LoRA r8 q,v", lora(8, *GPT2_QV), "37.7M", 2 * 96 * 8 * 24576),
    Row(LORA, "gpt3", "LoRA r4 q,v", lora(4, *GPT2_QV), "18M", 2 * 96 * 4 * 24576, "rounded down: 18.9M"),
    Row(
        LORA,
        "gpt2-medium",
        "LoRA r4 q,v",
        lora(4, *GPT2_QV),
        "0.35M",
        2 * 24 * 4 * 2048,
        "0.39M; 0.1% of all parameters would be 0.35M",
    ),
    Row(
        LORA,
        "gpt2-large",
        "LoRA r4 q,v",
        lora(4, *GPT2_QV),
        "0.77M",
        2 * 36 * 4 * 2560,
        "0.74M; 0.1% of all parameters would be 0.77M",
    ),
    Row(LORA, "roberta-base", "AdptD", bottleneck("pfeiffer", 16), "0.3M", adapters(12, 768, 16)),
    Row(LORA, "roberta-base", "AdptD", bottleneck("pfeiffer", 48), "0.9M", adapters(12, 768, 48)),
    Row(
        LORA,
        "roberta-large",
        "AdptP",
        bottleneck("pfeiffer", 64),
        "3.0M",
        adapters(24, 1024, 64),
        "a width of 64 gives 3.17M",
    ),
    Row(LORA, "roberta-large", "AdptP", bottleneck("pfeiffer", 16), "0.8M", adapters(24, 1024, 16)),
    Row(
        LORA,
        "roberta-large",
        "AdptH",
        bottleneck("houlsby", 64),
        "6.0M",
        adapters(48, 1024, 64),
        "a width of 64 gives 6.34M",
    ),
    Row(LORA, "roberta-large", "AdptH", bottleneck("houlsby", 8), "0.8M", adapters(48, 1024, 8)),
    Row(
        LORA,
        "gpt2-medium",
        "AdapterH",
        bottleneck("houlsby", 112),
        "11.09M",
        adapters(48, 1024, 112),
        "no width gives it: 112 gives 11.06M, 113 gives 11.16M",
    ),
    Row(
        LORA,
        "gpt2-medium",
        "AdapterH, norms",
        bottleneck("houlsby", 112, "ln_1", "ln_2"),
        "11.09M",
        adapters(48, 1024, 112) + 48 * 2 * 1024,
        "nor with the layers' norms: 112 gives 11.16M, 111 gives 11.06M",
    ),
    Row(
        LORA,
        "gpt2-medium",
        "FT-Top2",
        {"name": "full", "last_layers": 2},
        "25.19M",
        2 * (12 * 1024**2 + 13 * 1024),
    ),
    Row(LORA, "gpt2-medium", "FT", {"name": "full"}, "354.92M", 354_823_168, "the model has 354.82M"),
    Row(LORA, "gpt2-large", "FT", {"name": "full"}, "774.03M", 774_030_080),
    Row(LORA, "gpt3", "AdapterH", bottleneck("houlsby", 1), "7.1M", adapters(192, 12288, 1)),
    Row(LORA, "gpt3", "AdapterH", bottleneck("houlsby", 8), "40.1M", adapters(192, 12288, 8)),
    Row(
        LORA,
        "gpt3",
        "BitFit",
        {"name": "bitfit"},
        "14.2M",
        96 * 11 * 12288 + 12288,
        "a layer has 11 biases of its width, and they and the last norm's give 13.0M; 12 would give 14.2M",
    ),
    # 256 before and 8 within the text are as many embeddings as 264 before it
    Row(LORA, "gpt3", "PreEmbed 256 + 8", {"name": "prompt", "num_virtual_tokens": 264}, "3.2M", 264 * 12288),
    Row(
        LORA,
        "gpt3",
        "PreLayer 8 + 8",
        {"name": "prefix", "num_virtual_tokens": 8},
        "20.2M",
        96 * 12288 * 16,
        "16 vectors in every layer give 18.9M",
    ),
    Row(
        LORA,
        "gpt2-medium",
        "PreLayer",
        {"name": "prefix", "num_virtual_tokens": 5},
        "0.35M",
        2 * 24 * 1024 * 5,
        "no length does: 5 gives 0.25M, 7 gives 0.34M, 8 gives 0.39M",
    ),
    Row(BITFIT, "bert-base", "BitFit", {"name": "bitfit"}, "0.09%", 133 * 768, inside="bert.", of=BERT_BASE),
    Row(BITFIT, "bert-large", "BitFit", {"name": "bitfit"}, "0.08%", 265 * 1024, inside="bert.", of=BERT_LARGE),
    Row(
        BITFIT,
        "bert-large",
        "BitFit, query and MLP",
        {"name": "bitfit", "biases": "query+mlp"},
        "0.04%",
        24 * 5 * 1024,
        of=BERT_LARGE,
    ),
    Row(LORA, "roberta-base", "BitFit", {"name": "bitfit"}, "0.1M", 133 * 768, inside="roberta."),
    Row(
        HOULSBY,
        "bert-large",
        "width 64, norms",
        bottleneck("houlsby", 64, "output.LayerNorm"),
        "2.1%",
        adapters(48, 1024, 64) + 48 * 2 * 1024,
        "1.9%; the widths that the paper tried, 8 to 256, give 0.3% to 7.6%",
        of=BERT_LARGE,
    ),
    Row("PEFT's quick tour", "llama-3.2-1b", "LoRA r8 q", lora(8, "q_proj"), "524,288", 16 * 8 * 4096),
    Row("PEFT's guides", "opt-6.7b", "LoRA r16 q,v", lora(16, "q_proj", "v_proj"), "8,388,608", 2 * 32 * 16 * 8192),
    Row(
        "PEFT's guides",
        "bloomz-560m",
        "P-tuning 20, 128 wide",
        {"name": "p-tuning", "num_virtual_tokens": 20, "hidden_size": 128},
        "300,288",
        20 * 1024 + (1024 * 128 + 128) + (128 * 128 + 128) + (128 * 1024 + 1024),
    ),
    Row("PEFT's guides", "bloomz-560m", "prompt of 8", {"name": "prompt", "num_virtual_tokens": 8}, "8,192", 8 * 1024),
    # an encoder's and a decoder's 24 layers each attend to themselves, and the decoder's to the encoder as well
    Row("PEFT's guides", "flan-t5-large", "LoRA r16 q,v", lora(16, "q", "v"), "4,718,592", 2 * 72 * 16 * 2048),
    Row("PEFT's guides", "mt0-large", "LoRA r8 q,v", lora(8, "q", "v"), "2,359,296", 2 * 72 * 8 * 2048),
    Row("often quoted", "llama-2-7b", "LoRA r8 q,v", lora(8, "q_proj", "v_proj"), "4,194,304", 2 * 32 * 8 * 8192),
    Row(
        "often quoted",
        "llama-3-8b",
        "LoRA r16 all-linear",
        lora(16),
        "41,943,040",
        32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    ),
]

# bases of tests/refused, with what is published for them
REFUSED = {
    "deberta-v2-xxlarge": "LoRA r16 q,v 4.7M, with a head 27.1 MB",
    "whisper-large-v2": "LoRA r32 q,v 15,728,640",
}
NOT_OFFERED = {
    "AdapterL (GPT-2 M 0.37M, 11.09M; GPT-2 L 0.88M, 23.00M)": "a bottleneck with a norm of its own",
}


def path_of(base: str) -> Path:
    return ROOT / "configs" / "models" / f"{base}.json"


def counts_of(base: str, method: dict[str, Any], path: Path | None = None, labels: int = 0) -> Counts:
    found, resolved = methods.get(method["name"]), bases.resolve(str(path or path_of(base)))
    if labels:
        resolved = resolved._replace(task=Task("sequence-classification", tuple(map(str, range(labels)))))
    return count(resolved, found, found.config(**method))


def refusal(base: str) -> str:
    """What is said about a base that cannot be counted."""
    try:
        counts_of(base, {"name": "lora"}, ROOT / "tests" / "refused" / f"{base}.json")
    except PeftctlError as error:
        return str(error).removeprefix(f"{ROOT}/")
    raise AssertionError(f"{base} is served: give it a row")


def main() -> None:
    """Print the table."""
    lines = [("base", "what", "published", "ours", "")]
    for total in TOTALS:
        ours = f"{total.counted() + total.beside:,}"
        lines.append((total.base, "all parameters", total.published, ours, verdict(total.published == ours, total.why)))
    for row in ROWS:
        ours = row.counted()
        said = verdict(row.matches(ours), row.why)
        lines.append((row.base, f"{row.called} ({row.source})", row.published, f"{ours:,}", said))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for base, what, published, ours, said in lines:
        print(f"{base:<{widths[0]}}  {what:<{widths[1]}}  {published:>{widths[2]}}  {ours:>{widths[3]}}  {said}")
    print()
    for base, what in REFUSED.items():
        print(f"not counted: {what} of {base}: {refusal(base)}")
    for what, lacking in NOT_OFFERED.items():
        print(f"not offered: {what}: {lacking}")


def verdict(matches: bool, why: str) -> str:
    return "matches" if matches else f"differs: {why}"


if __name__ == "__main__":
    main()
