"""How generated answers compare with the right ones: exact match, ROUGE, BLEU and chrF, by the field's libraries.

ROUGE: https://aclanthology.org/W04-1013, by `rouge-score`; BLEU: https://aclanthology.org/P02-1040 and chrF:
https://aclanthology.org/W15-3049, by `sacrebleu`, each as the library does it when it is told nothing. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import fsum

from peftctl.errors import InputError, suggest
from peftctl.imports import undrawn

# each metric, and the package that measures it as it is imported and as it is installed
EACH: dict[str, tuple[str, str] | None] = {
    "exact_match": None,
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), ("rouge_score", "rouge-score")),
}
CORPUS: dict[str, tuple[str, str]] = dict.fromkeys(("bleu", "chrf"), ("sacrebleu", "sacrebleu"))
NAMES = (*EACH, *CORPUS)
LENGTHS = ("completions/length", "completions/ended")  # what is told beside them: tokens, and the share that ended


def fault(name: str) -> str | None:
    """Why that metric cannot be measured here, None if it can."""
    if name not in NAMES:
        return f"there is no metric {name!r}{suggest(name, NAMES) or ';'} there are {', '.join(NAMES)}"
    package = {**EACH, **CORPUS}[name]
    if package is not None and find_spec(package[0]) is None:
        return f"{name} is measured by the package {package[1]}, which is not installed: pip install {package[1]}"
    return None


def check(names: Sequence[str], key: str) -> None:
    """Raises InputError for what cannot be measured; `key`: where it was asked for."""
    for name in names:
        if (said := fault(name)) is not None:
            raise InputError(f"{key}: {said}")


def of_each(answers: Sequence[str], right: Sequence[str], names: Sequence[str]) -> list[dict[str, float]]:
    """What is measured of each answer by itself, from 0 to 1; of ROUGE the F-measure."""
    rouge = [name for name in names if name.startswith("rouge")]
    scorer = undrawn("rouge_score.rouge_scorer").RougeScorer(rouge) if rouge else None
    found = []
    for answer, wanted in zip(answers, right, strict=True):
        scores = scorer.score(wanted, answer) if scorer is not None else {}
        own = {name: float(score.fmeasure) for name, score in scores.items()}
        if "exact_match" in names:
            own["exact_match"] = float(answer.strip() == wanted.strip())
        found.append(own)
    return found


def of_all(answers: Sequence[str], right: Sequence[str], names: Sequence[str]) -> Mapping[str, float]:
    """What is measured of all answers together, in the order of `names`: means over answers; BLEU and chrF, from 0 to
    100, over the corpus. Whatever their order, the numbers are the same.
    """
    each = of_each(answers, right, names)
    found = {name: fsum(own[name] for own in each) / len(each) for name in names if name in EACH}
    for name in names:
        if name in CORPUS:
            library = undrawn("sacrebleu.metrics")
            # force: no remark on answers that look tokenized
            metric = library.BLEU(force=True) if name == "bleu" else library.CHRF()
            said, wanted = ([text.strip() for text in texts] for texts in (answers, right))
            found[name] = float(metric.corpus_score(said, [wanted]).score)
    return {name: found[name] for name in names}
