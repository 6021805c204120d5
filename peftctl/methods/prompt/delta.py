"""The prompt: one embedding for each virtual token. https://arxiv.org/abs/2104.08691"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftctl import surgery
from peftctl.methods._blocks import input_embedding
from peftctl.methods._prompts import embedded
from peftctl.methods._rows import Rows, RowsAttachment
from peftctl.methods.attachment import Attachment
from peftctl.methods.prompt import PromptConfig


class Prompt(Rows):
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(rows)

    def rows(self) -> Tensor:
        return self.prompt


def attach(model: nn.Module, config: PromptConfig) -> Attachment:
    table = surgery.skeleton(model)
    width, lookup = embedded(table), surgery.find(model, input_embedding(table).path)
    like = next(lookup.parameters())
    if config.init == "random":
        rows = torch.rand(config.num_virtual_tokens, width) - 0.5  # section 3.2
    else:
        drawn = torch.randint(table.dimensions.vocabulary, (config.num_virtual_tokens,))
        ids = torch.tensor(config.ids) if config.init == "text" else drawn
        rows = lookup(ids.to(like.device)).detach().float()  # what it gives, with the scale that some families put on
    return RowsAttachment(Prompt(rows), like.dtype)
