"""The encoder that makes the virtual tokens' embeddings: an MLP, or an LSTM and an MLP. https://arxiv.org/abs/2103.10385"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftctl import surgery
from peftctl.errors import FormatError
from peftctl.methods._blocks import input_embedding
from peftctl.methods._prompts import embedded
from peftctl.methods._rows import Rows, RowsAttachment
from peftctl.methods.attachment import Attachment
from peftctl.methods.p_tuning import LSTM_LAYERS, PTuningConfig


class Encoded(Rows):
    def __init__(self, config: PTuningConfig, width: int) -> None:
        super().__init__()
        size = config.hidden_size or width
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        self.lstm = None
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(width, size, LSTM_LAYERS, bidirectional=True, batch_first=True)
        widths = {"mlp": (width, size, size, width), "lstm": (2 * size, 2 * size, width), "none": ()}[config.encoder]
        self.linears = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def rows(self) -> Tensor:
        h: Tensor = self.embedding
        if self.lstm is not None:
            h = self.lstm(h[None])[0][0]
        for index, linear in enumerate(self.linears):
            h = linear(torch.relu(h) if index else h)
        return h


class EncodedAttachment(RowsAttachment):
    def load(self, tensors: Mapping[str, Tensor], origin: str = "adapter") -> None:
        if set(tensors) == {"embedding"} != set(self.tensors()):
            raise FormatError(
                f"{origin} holds the virtual tokens without the encoder that made them: set method.encoder: none"
            )
        super().load(tensors, origin)


def attach(model: nn.Module, config: PTuningConfig) -> Attachment:
    table = surgery.skeleton(model)
    width, lookup = embedded(table), surgery.find(model, input_embedding(table).path)
    return EncodedAttachment(Encoded(config, width), next(lookup.parameters()).dtype)
