"""Virtual tokens that enter the model as embeddings before the real tokens'."""

from __future__ import annotations

import torch
from torch import Tensor

from peftctl.errors import Unfoldable
from peftctl.methods.attachment import Attachment, Delta, Virtual


class Rows(Delta):
    """The virtual tokens' embeddings, however they are made."""

    def rows(self) -> Tensor:
        """(tokens, width)"""
        raise NotImplementedError

    def fold(self, name: str, weight: Tensor) -> Tensor:
        raise Unfoldable("virtual tokens are an input of their own, which no weight of the base can hold")


class RowsAttachment(Attachment):
    """Nothing hangs on a module: the policy lays the virtual tokens before the real ones."""

    shared: Rows

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        super().__init__(shared=rows)
        self.dtype = dtype

    def virtual(self) -> Virtual | None:
        if not self.shared.enabled:
            return None
        rows = self.shared.rows().to(self.dtype)
        return Virtual(len(rows), embeds=rows)
