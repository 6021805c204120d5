"""What an objective is: pure functions of a policy's answers about a batch.

The module is torch-free: objectives import torch inside their functions. An objective is a file here that exports
`OBJECTIVE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from peftctl.row import Example, Message, Row

if TYPE_CHECKING:
    from torch import Tensor

    from peftctl.batch import Batch


class ObjectiveConfig(BaseModel):
    """What every objective's block in a recipe has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str


C = TypeVar("C", bound=ObjectiveConfig)


class Term(NamedTuple):
    """A weighted sum. The optimizer minimises `coefficient * sum / weight`, the weight taken over the whole step."""

    sum: Tensor
    coefficient: float = 1.0


class Loss(NamedTuple):
    """`metrics` are (sum, count), so that micro-batches and ranks average right.

    `predictions`: what was said and what is true, n numbers or texts each, for metrics that no sum gives.
    """

    terms: tuple[Term, ...]
    metrics: dict[str, tuple[Tensor, Tensor]]
    predictions: tuple[Tensor | Sequence[str], Tensor | Sequence[str]] | None = None


class TokenStats(NamedTuple):
    """Per label, fp32, shape (labels,): the log-probability of the target and whether it is the likeliest token.

    `mean_logprob`: where it was asked for, the mean log-probability of all the vocabulary's tokens.
    """

    logprob: Tensor
    correct: Tensor
    mean_logprob: Tensor | None = None


class Answers(Protocol):
    """What an objective may ask of a policy, or of the reference."""

    def tokens(self, batch: Batch, mean: bool = False) -> TokenStats:
        """`mean`: the means too."""


class Scored(Answers, Protocol):
    """What an objective may ask of a policy whose base has a task's head. `outputs`: one a label, fp32."""

    def row_scores(self, batch: Batch) -> Tensor:
        """(rows, outputs)"""

    def token_scores(self, batch: Batch) -> Tensor:
        """(labels, outputs)"""


class Answer(NamedTuple):
    """What a policy answered to a prompt: its tokens, as text, and whether it ended by itself."""

    ids: tuple[int, ...]
    text: str
    ended: bool


# of prompts, the number of answers to each and the most tokens of one -> for each prompt its answers
Generate = Callable[[Sequence[Row], int, int], "list[list[Answer]]"]


class Generated(NamedTuple):
    """What is measured of the answers that a policy gives by itself to held-out prompts."""

    metrics: tuple[str, ...]  # of `metrics.NAMES`
    max_new_tokens: int


class Encoder(Protocol):
    """What an objective may ask of the tokenizer and its chat template. Raises DataError with the example's place."""

    def dialogue(
        self, messages: Sequence[Message], trained: str | Sequence[str], tools: Sequence[Any] = ()
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ids and label weights of a rendered dialogue.

        `trained`: `assistant` (all its turns), `last` (its last), `all` (the whole text), or the roles whose turns are
        learnt; a message's own weight goes before that. `tools`: what the template is shown as such.
        """

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[int, ...]:
        """Ids of a dialogue up to where the assistant's next answer begins."""

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt."""

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids; with `special`, special tokens are written out."""

    def texts(self, first: str, second: str | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a text or a pair, and which of a pair's texts each token belongs to, nothing where it is all one."""

    def words(self, words: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of words with spaces between them, and the index of each word's first token."""

    def completion(self, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ids and label weights of plain prompt and answer, the end-of-text token after the answer included."""

    def text(self, text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ids and label weights of a whole text, all of which is learnt, its end-of-text token included."""


@dataclass(frozen=True)
class Objective(Generic[C]):
    """The one name that an objective's file exports.

    `weights` gives the weight of each term of `loss` for one batch, known before any forward pass: the trainer adds
    them up over the step, so that 4 micro-batches of 1 equal 1 of 4. Where the loss of an example depends on the others
    of its step, `shared` answers what it must know of them: it is asked once, about all of the step's batches (or all
    held-out ones), without gradients or dropout, and `loss` gets the answer as a fifth argument.

    Where the policy's own answers are learnt from, the encoded rows are prompts, each with `room` for an answer, and
    `rollout` turns a step's prompts into rows that `loss` can read. The data source runs it, without gradients or
    dropout. Where `repeats` is above 1, that many steps learn from the same rows, and `row.extra["old"]` has the
    log-probability of each label before the first of them.
    """

    name: str
    summary: str
    paper: str
    config: type[C]
    kinds: frozenset[str]  # the kinds of `Example` it can learn from
    encode: Callable[[Example, Encoder, C], tuple[Row, ...]]
    weights: Callable[[Batch, C], tuple[float, ...]]
    loss: Callable[..., Loss]  # of policy, reference, batch and config; with `shared`, of its answer too
    reference: Callable[[C], str | None] = lambda config: None  # "initial", "base", a path of an adapter, or None
    base_dropout: bool = True  # whether dropout inside the base is left on, as its config says
    # all examples' rows and a permutation that the seed draws -> the examples, whose rows may now be others' in part
    pair: Callable[[Sequence[tuple[Row, ...]], Sequence[int]], tuple[tuple[Row, ...], ...]] | None = None
    shared: Callable[[Answers, Answers | None, Iterable[Batch], C], Mapping[str, Tensor]] | None = None
    task: str = "causal-lm"  # what model.task must be
    # fills in what a recipe leaves to its training examples
    settle: Callable[[C, Sequence[Example]], C] | None = None
    # metrics of all predictions together: of what was said and what is true
    judge: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]] | None = None
    # the names of what is measured on held-out rows beside the loss, as far as a config tells
    reports: Callable[[C], Sequence[str]] = lambda config: ()
    # the answers to be generated for held-out rows, of which `encode` then tells in `row.extra` the right one
    # (`answer`; None: as its labels say it) and how many of the row's last tokens are not its prompt's (`asked`)
    generates: Callable[[C], Generated | None] = lambda config: None
    reading: tuple[str, ...] = ()  # keys of its config that say how rows are read and what is measured of them
    labels: Callable[[C], tuple[str, ...]] = lambda config: ()  # the names of the head's outputs
    # the keys of a config that a head with these labels was trained by; None where it cannot have been
    measures: Callable[[tuple[str, ...]], Mapping[str, Any] | None] = lambda labels: None
    # what keeps it from an encoder-decoder, whose answers are learnt alone; None where nothing does
    one_sided: Callable[[C], str | None] = lambda config: "which needs causal-lm"
    rollout: Callable[[Generate, Sequence[Row], C], list[Row]] | None = None
    room: Callable[[C], int] = lambda config: 0
    repeats: Callable[[C], int] = lambda config: 1
    code: Callable[[C], tuple[str, ...]] = lambda config: ()  # functions FILE.py:FUNCTION that it wants to run
    start: Callable[[C], float | None] = lambda config: None  # the loss where policy and reference are equal
    likelihood: bool = False  # whether the loss is a mean negative log-likelihood, so that exp(loss) is a perplexity
