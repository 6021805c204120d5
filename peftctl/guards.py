"""What ends a run that is going nowhere: a step without enough memory, or training that stands still.

Reads losses and parameters alone, so it changes no bit of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from peftctl.errors import TrainingError

PATIENCE = 50  # steps
_CHUNK = 1 << 20  # elements looked at together, for their bits are widened to 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# torch has a class of its own for CUDA's; the CPU's and MPS's are known by their words alone
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def memory(what: str) -> Iterator[None]:
    """Names what was done when memory ran out, and what to change. Raises TrainingError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(word in text for word in _WORDS):
            raise
        found = (text.splitlines() or ["no figure is given"])[0][:160]
        raise TrainingError(
            f"{what}: out of memory ({found}); set train.gradient_checkpointing: true, or lower "
            "train.batch_size (and raise train.gradient_accumulation as much) or train.tokens_per_batch: --resume "
            "then goes on from the newest checkpoint; or lower data.max_length, which makes it another run"
        ) from error


class Standstill:
    """Told of every step; raises TrainingError when parameters or loss have not changed for `PATIENCE` of them.

    Steps with a learning rate of 0 do not count.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.steps = 0
        self.marks: list[int] = []
        self.loss: float | None = None
        self.same = 0
        self.changed = False  # whether the loss ever did

    def check(self, step: int, loss: float, lr: float, norm: float = 0.0) -> None:
        """`norm`: of the gradient."""
        if not lr:
            return
        self._parameters(step, lr)
        self._loss(step, loss, lr, norm)

    def _parameters(self, step: int, lr: float) -> None:
        if self.steps % PATIENCE == 0:
            marks = _marks(self.parameters)
            if marks == self.marks:
                raise TrainingError(
                    f"step {step}: no parameter changed in {PATIENCE} steps (lr {lr:.3g}): train.learning_rate is too "
                    "small for the parameters' type, or no label depends on what is trained; see method and data"
                )
            self.marks = marks
        self.steps += 1

    def _loss(self, step: int, loss: float, lr: float, norm: float) -> None:
        equal = loss == self.loss
        self.changed |= self.loss is not None and not equal
        self.same = self.same + 1 if equal else 0
        self.loss = loss
        # a loss that came down to 0 has learnt all there is; one that has a slope there is a sum that cancels
        if self.same >= PATIENCE and not (loss == 0 and (self.changed or norm)):
            raise TrainingError(
                f"step {step}: the loss was exactly {loss:.6g} for {PATIENCE} steps (lr {lr:.3g}): no label depends on "
                "what is trained, or train.learning_rate is too small to show; see method, data and "
                "peftctl validate --show 2"
            )


def _marks(parameters: Mapping[str, Tensor]) -> list[int]:
    """One number a parameter, which changes when any of its bits does, but for a chance of some 1 in 2^64."""
    found = [_mark(tensor.detach()) for tensor in parameters.values()]
    return [int(number) for number in torch.stack(found).tolist()]


def _mark(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    # squared: in a plain sum, one number's last bit up and another's down would cancel
    return torch.stack([chunk.long().square().sum() for chunk in torch.split(bits, _CHUNK)]).sum()
