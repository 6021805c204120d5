"""The blocks below the lowest delta, which answer the same about a row in every epoch: found, asked, and passed over.

The last bits of a row's answer depend on the rows that it was computed with. Whoever keeps answers must ask about the
same groups of rows each time, or a run that was stopped could not be gone on with bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.batch import Batch, build
from peftctl.checkpoint import random_state
from peftctl.errors import TargetError
from peftctl.kernels.attention import Unsupported
from peftctl.layout import LOOSE, TOLERANCE, distance
from peftctl.methods._blocks import blocks
from peftctl.methods.attachment import Attachment
from peftctl.policy import Policy
from peftctl.row import Row
from peftctl.surgery import device_of, skeleton, swapped

Known = Callable[[Row], Tensor | None]  # (tokens, d) of a row, as the frozen blocks answer


class Frozen:
    """The first `count` blocks of a policy's stack. `rest`: what a block answers after its hidden states, as a tuple;
    None where it answers with the hidden states alone."""

    def __init__(self, policy: Policy, paths: Sequence[str], count: int, rest: tuple[None, ...] | None) -> None:
        self.policy = policy
        self.paths = paths
        self.count = count
        self._stack = [policy.model.get_submodule(path) for path in paths]
        self._rest = rest

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the frozen blocks' answers are made of, by name: the trunk's tensors but those of later blocks."""
        later = tuple(f"{path}." for path in self.paths[self.count :])
        names = {id(module): name for name, module in self.policy.model.named_modules()}
        trunk = names[id(self.policy.trunk)]
        for name, tensor in self.policy.trunk.state_dict().items():
            full = f"{trunk}.{name}" if trunk else name
            if not full.startswith(later):
                yield full, tensor

    @torch.no_grad()
    def answers(self, rows: Sequence[Row], share: str = "all") -> list[Tensor]:
        """What the frozen blocks answer about some rows, (tokens, d) each; later blocks and all deltas are left out.

        `share`: as for a batch.
        """
        above = dict.fromkeys(self._stack[self.count :], self._through)
        with self.policy.attachment.disabled(), _answering(above):
            return self._answers(rows, share)

    @contextmanager
    def passed_over(self, known: Known) -> Iterator[None]:
        """Within it, a batch whose rows are all known skips the frozen blocks."""
        before = self.policy.below
        self.policy.below = partial(self._skipped, known)
        try:
            yield
        finally:
            self.policy.below = before

    def fault(self, rows: Sequence[Row]) -> str | None:
        """Why these blocks cannot be passed over, None if they can: tried on a few rows."""
        try:
            if self._draws(rows):
                return "the base has dropout"
            with evaluating(self.policy):
                return self._fault(rows)
        except (Unsupported, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no message'}"

    @torch.no_grad()
    def _fault(self, rows: Sequence[Row]) -> str | None:
        known = dict(zip(rows, self.answers(rows), strict=True))
        trained = self.policy.attachment.trainable()
        generator = torch.Generator().manual_seed(0)
        with swapped(trained, {n: torch.randn(p.shape, generator=generator).to(p) for n, p in trained.items()}):
            moved = self._answers(rows)
        if not all(torch.equal(answer, known[row]) for row, answer in zip(rows, moved, strict=True)):
            return "they change with the adapter"
        batch = build(rows).to(device_of(self.policy.model))
        expected = self.policy.row_hidden(batch)
        with self.passed_over(known.get):
            found = self.policy.row_hidden(batch)
        worst = max(distance(a, b) for a, b in zip(found, expected, strict=True))
        limit = TOLERANCE.get(expected[0].dtype, LOOSE)
        return None if worst <= limit else f"without them the answers differ by {worst:.1e} (at most {limit:.0e})"

    def _draws(self, rows: Sequence[Row]) -> bool:
        """Whether the frozen blocks, in the mode they are in, ask for random numbers."""
        before = random_state()
        self.answers(rows)
        return any(not torch.equal(state, before[name]) for name, state in random_state().items())

    def _answers(self, rows: Sequence[Row], share: str = "all") -> list[Tensor]:
        batch = build(rows, "none" if self.policy.layout.name == "joined" else share)
        answers: list[Any] = []
        last = self._stack[self.count - 1]
        handle = last.register_forward_hook(lambda module, args, output: answers.append(output))
        try:
            self.policy.row_hidden(batch.to(device_of(self.policy.model)))
        finally:
            handle.remove()
        return [_hidden(answers[0])[0][tokens] for tokens in batch.row_tokens]

    @contextmanager
    def _skipped(self, known: Known, batch: Batch) -> Iterator[None]:
        states = [known(row) for row in batch.rows]
        there = [state for state in states if state is not None]
        if len(there) < len(states):
            yield
            return
        hidden = _assembled(batch, there).to(batch.ids.device)[None]
        forwards = dict.fromkeys(self._stack[: self.count], self._through)
        with _answering(forwards | {self._stack[self.count - 1]: lambda *args, **kwargs: self._whole(hidden)}):
            yield

    def _through(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A block that does nothing."""
        return self._whole(hidden)

    def _whole(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)


def find(policy: Policy, row: Row) -> Frozen | None:
    """The blocks below the lowest delta; None where there are none, or where nobody can say. `row`: any, to try on."""
    if policy.layout.name == "padded" or policy.attachment.virtual() is not None or policy.balance is not None:
        return None
    try:
        paths = [block.path for block in blocks(skeleton(policy.model))]
    except TargetError:
        return None
    count, outside = _untouched(policy.attachment, paths)
    answers = _trial(policy, paths, outside, row) if count else None
    if answers is None:
        return None
    hidden, answer = _hidden(answers[count - 1]), answers[count - 1]
    rest = tuple(answer[1:]) if isinstance(answer, tuple) else None
    usual = hidden.ndim == 3 and hidden.shape[:2] == (1, len(row.ids)) and not any(r is not None for r in rest or ())
    return Frozen(policy, paths, count, rest) if usual else None


def _untouched(attachment: Attachment, paths: Sequence[str]) -> tuple[int, list[str]]:
    """How many of the first blocks hold no delta's place or source; the places outside the blocks."""
    lowest, outside = len(paths), []
    for path in filter(None, [*attachment.paths, *attachment.sources]):
        inside = [index for index, block in enumerate(paths) if f"{path}.".startswith(f"{block}.")]
        lowest = min([lowest, *inside])
        if not inside:
            outside.append(path)
    return lowest, outside


@torch.no_grad()
def _trial(policy: Policy, paths: Sequence[str], outside: Sequence[str], row: Row) -> list[Any] | None:
    """What each block answers about a row; None where a module outside is asked before all blocks are."""
    answers: list[Any] = []
    early: list[bool] = []

    def asked(module: nn.Module, args: Any) -> None:
        early.append(len(answers) < len(paths))

    handles = [
        policy.model.get_submodule(path).register_forward_hook(lambda module, args, output: answers.append(output))
        for path in paths
    ]
    handles += [policy.model.get_submodule(path).register_forward_pre_hook(asked) for path in outside]
    try:
        with evaluating(policy):
            policy.row_hidden(build([row]).to(device_of(policy.model)))
    finally:
        for handle in handles:
            handle.remove()
    return answers if len(answers) == len(paths) and not any(early) else None


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Every module in eval mode; afterwards each in its own mode again."""
    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _answering(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in the modules' place for a while."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def _hidden(answer: Any) -> Tensor:
    value: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return value


def _assembled(batch: Batch, states: Sequence[Tensor]) -> Tensor:
    """The states of a batch's tokens, (T, d), from its rows'. What rows share is the same in each but for rounding."""
    hidden = states[0].new_empty(len(batch), states[0].shape[1])
    for path, state in zip(batch.paths, states, strict=True):
        start = 0
        for first, end in (batch.spans[segment] for segment in path):
            hidden[first:end] = state[start : start + end - first]
            start += end - first
    return hidden
