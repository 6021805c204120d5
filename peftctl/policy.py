"""The waist: a base with its deltas answers about a batch, whatever method and objective there are.

The policy lays a batch out (`layout.py` chooses how), runs the trunk, and applies the head at labelled
positions only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.batch import Batch
from peftctl.errors import ModelError
from peftctl.fuse import fuse
from peftctl.head import Head
from peftctl.kernels import attention
from peftctl.kernels.rectangles import Plan
from peftctl.kernels.token_stats import token_stats
from peftctl.methods.attachment import Attachment, Virtual
from peftctl.objectives.base import Term, TokenStats
from peftctl.routing import ASKED, Balance
from peftctl.scores import TaskHead
from peftctl.seq2seq import hidden as both_sides
from peftctl.seq2seq import rectangle, two_sided
from peftctl.surgery import swapped


class Layout(NamedTuple):
    """`shared`: the forest. `joined`: each row a tree of its own, in one line. `padded`: a rectangle of rows.

    `first_position`: the position that the architecture gives to a row's first token.
    """

    name: str
    first_position: int = 0
    reason: str = ""  # why the faster ones were not taken


class Policy(nn.Module):
    """A frozen model and the deltas attached to it. `forward` is trunk and head in one, so that it can be sharded."""

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        layout: Layout,
        head: Head | None,
        task_head: TaskHead | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.attachment = attachment
        self.layout = layout
        self.head = head
        self.task_head = task_head
        # what a pass over a batch runs in: `frozen.py` puts what it knows in the place of the lowest blocks
        self.below: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext()
        self.balance: Balance | None = None  # of a mixture of experts whose routers' loss counts
        self.packed = self.packs = False  # whether copies in the device's own order are asked for; whether any is kept
        self._plan: Plan | None = None  # the last one: the reference is asked about the same batch
        self.attention_calls = 0  # how often the last forest asked for attention: what the layout check compares

    def forward(self, batch: Batch, want: str = "tokens") -> TokenStats | Tensor:
        """`want`: `tokens`, `means` (tokens with their mean log-probabilities), or `scores` of a task's head."""
        if want == "scores":
            return self._scores(batch)
        if self.head is None:
            raise ModelError(f"{type(self.model).__name__} has no output head that predicts tokens")
        hidden, places = self.hidden(batch)
        at_labels = hidden[places]
        trained = any(path.startswith(tuple(self.head.paths)) for path in self.attachment.paths)
        frozen = None if trained else self.head.frozen
        head, vocabulary = self.head, self.head.vocabulary
        return TokenStats(*token_stats(at_labels, batch.labels.target, head, vocabulary, frozen, want == "means"))

    def _scores(self, batch: Batch) -> Tensor:
        if self.task_head is None:
            raise ModelError(f"{type(self.model).__name__} has no head that scores rows or tokens")
        hidden, places = self.hidden(batch, first=self.task_head.reads == "first")
        return self.task_head(hidden[places])

    def fuse(self, *, pack: bool) -> None:
        """Go on with the fast kernels in place of the plain ones."""
        self.packs = fuse(self.model, self.attachment, pack=pack)
        if self.head is not None:
            self.head.frozen = self.head.multiplied_by(pack=pack)
            self.packs |= self.head.frozen.packed
        self.packed = pack

    def exact_logits(self) -> None:
        """Take the logits in fp32 from here on, over a base in half precision."""
        if self.head is not None:
            self.head.frozen = self.head.multiplied_by(pack=self.packed, exact=True)

    def tokens(self, batch: Batch, mean: bool = False) -> TokenStats:
        """Per label of the batch: fp32 log-probability and correctness, each (labels,); with `mean`, the mean too."""
        answer: TokenStats = self(batch, "means" if mean else "tokens")
        return answer

    def row_scores(self, batch: Batch) -> Tensor:
        """Per row of the batch, each of which has one label, what the task's head says: (rows, outputs), fp32."""
        answer: Tensor = self(batch, "scores")
        return answer

    def token_scores(self, batch: Batch) -> Tensor:
        """Per label of the batch, what the task's head says at its token: (labels, outputs), fp32."""
        answer: Tensor = self(batch, "scores")
        return answer

    def auxiliary(self, batch: Batch) -> list[Term]:
        """The model's own losses, of the passes with gradients that were asked for about the batch: its routers'."""
        if self.balance is None:
            return []
        return [Term(self.balance.loss() * batch.visited, self.balance.coefficient)]

    def hidden(self, batch: Batch, first: bool = False) -> tuple[Tensor, Tensor]:
        """The trunk's last hidden states (N, d), and for each label the index of its source among them.

        `first`: that of its row's first token instead, a virtual one where there are any that are run.
        """
        virtual = self.attachment.virtual()
        batch = self._laid_out(batch, virtual)
        if self.layout.name == "padded":
            return self._padded(batch, virtual, first)
        return self._forest(batch, virtual), batch.firsts if first else batch.labels.source

    def row_hidden(self, batch: Batch) -> list[Tensor]:
        """The trunk's last hidden states row by row, (length, d) each; what a test or a layout check compares.

        Of an encoder-decoder, the decoder's.
        """
        virtual = self.attachment.virtual()
        first = virtual.run if virtual is not None else 0
        batch = self._laid_out(batch, virtual)
        if self.layout.name == "padded":
            hidden, _ = self._padded(batch, virtual)
            lengths = [len(row.ids) - row.source for row in batch.rows]
            width = max(lengths)
            return [hidden[i * width + first : i * width + length] for i, length in enumerate(lengths)]
        hidden = self._forest(batch, virtual)
        return [hidden[tokens[first:]] for tokens in batch.row_tokens]

    def _laid_out(self, batch: Batch, virtual: Virtual | None) -> Batch:
        """The batch as the layout has it. Embedded virtual tokens are every row's first, so a forest's one root."""
        alone = self.layout.name == "joined"
        if virtual is not None and virtual.embeds is not None:
            return batch.behind(virtual.length, share="none" if alone else "all")
        return batch.unshared() if alone else batch

    def _inputs(self, ids: Tensor, positions: Tensor, virtual: Virtual | None) -> dict[str, Tensor]:
        """What the trunk is given for ids and their places in their rows, (R, T) each."""
        if virtual is None or virtual.embeds is None:
            return {"input_ids": ids}
        real: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        rows = virtual.embeds.to(real.dtype)[positions.clamp(max=virtual.length - 1)]
        return {"inputs_embeds": torch.where((positions < virtual.length)[..., None], rows, real)}

    def _forest(self, batch: Batch, virtual: Virtual | None) -> Tensor:
        length = virtual.held if virtual is not None else 0
        if two_sided(self.model):
            raise attention.Unsupported("a decoder that reads an encoder's answer has two sides, which are padded")
        if self._plan is None or self._plan.batch is not batch:
            self._plan = Plan(batch)
        state = attention.Running(self._plan, *((virtual.keys, virtual.values) if virtual else ()))
        positions = batch.positions + length + self.layout.first_position
        with attention.running(self.model, state), self.below(batch):
            inputs = self._inputs(batch.ids[None], batch.positions[None], virtual)
            types = self._types(None if batch.types is None else batch.types[None])
            output = self._run(inputs | types | self.positions(positions[None]), batch.counts, batch.positions, virtual)
        self.attention_calls = state.calls
        return last_hidden(output)[0]

    def _padded(self, batch: Batch, virtual: Virtual | None, first: bool = False) -> tuple[Tensor, Tensor]:
        rows, device = batch.rows, batch.ids.device
        if two_sided(self.model):
            return self._sides(batch, virtual)
        ids, real = rectangle([row.ids for row in rows], device)
        width, types = ids.shape[1], None
        if batch.types is not None:
            types, _ = rectangle([row.types or (0,) * len(row.ids) for row in rows], device)
        length = virtual.held if virtual is not None else 0
        mask = torch.cat([real.new_ones(len(rows), length), real], dim=1).long()
        places_in_row = torch.arange(width, device=device).expand(len(rows), -1)
        extra = self.positions(places_in_row + length + self.layout.first_position) | self._types(types)
        if virtual is not None and length:
            extra = extra | {self.cache_name: cache_of(virtual, len(rows)), "use_cache": True}
        inputs = self._inputs(ids, places_in_row, virtual) | {"attention_mask": mask} | extra
        output = self._run(inputs, real.flatten(), places_in_row.flatten(), virtual)
        places = batch.labels.row * width + (0 if first else batch.positions[batch.labels.source])
        return last_hidden(output).flatten(0, 1), places

    def _sides(self, batch: Batch, virtual: Virtual | None) -> tuple[Tensor, Tensor]:
        states = both_sides(self.model, batch, virtual)
        before = torch.tensor([row.source for row in batch.rows], device=batch.ids.device)
        row = batch.labels.row
        places = row * states.shape[1] + batch.positions[batch.labels.source] - before[row]
        return states.flatten(0, 1), places

    def _run(self, inputs: dict[str, Any], counts: Tensor, positions: Tensor, virtual: Virtual | None) -> Any:
        """What the trunk answers. For its routers' loss: how often each token counts, and its place in its rows."""
        inputs = ({"use_cache": False} if "use_cache" in self._accepted else {}) | inputs
        if self.balance is None or not torch.is_grad_enabled():
            return self.trunk(**inputs)
        output = self.trunk(**inputs | ASKED)
        self.balance.hear(output, counts * (positions >= (virtual.run if virtual is not None else 0)))
        return output

    @property
    def trunk(self) -> Any:
        return getattr(self.model, "base_model", self.model)

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.trunk.forward).parameters)

    @property
    def cache_name(self) -> str:
        """transformers 5 renamed `past_key_values` to `cache` on the way."""
        names = [name for name in ("cache", "past_key_values") if name in self._accepted]
        if not names:
            raise ModelError(f"{type(self.model).__name__} accepts no attention cache, which this method needs")
        return names[0]

    def positions(self, positions: Tensor) -> dict[str, Tensor]:
        """Positions as the trunk takes them; nothing where it takes none."""
        return {"position_ids": positions} if "position_ids" in self._accepted else {}

    def _types(self, types: Tensor | None) -> dict[str, Tensor]:
        # others take them for tokens (GPT-2), or not at all
        known = (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1
        return {"token_type_ids": types} if types is not None and known and "token_type_ids" in self._accepted else {}


def last_hidden(output: Any) -> Tensor:
    value: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return value


def cache_of(virtual: Virtual, rows: int) -> Any:
    """An attention cache that holds the virtual tokens, once for each row."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(virtual.keys, virtual.values, strict=True)):
        cache.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), layer)
    return cache


class Reference:
    """The policy as it was at step 0, asked without gradients.

    By the switch where the deltas started as identity on the bare base; otherwise by a frozen copy of the initial
    deltas, whose tensors then belong into every checkpoint.
    """

    def __init__(self, policy: Policy, initial: dict[str, Tensor] | None) -> None:
        self.policy = policy
        self.initial = initial
        # the log-probabilities of a batch's labels where they are known already: `remembered.py` knows them
        self.known: Callable[[Batch], Tensor | None] = lambda batch: None

    @torch.no_grad()
    def tokens(self, batch: Batch, mean: bool = False) -> TokenStats:
        """As the policy's. Of what is remembered only the log-probabilities count; correctness is nobody's question."""
        logprob = None if mean else self.known(batch)
        if logprob is not None:
            return TokenStats(logprob, torch.zeros_like(logprob, dtype=torch.bool))
        with self._as_it_was():
            return self.policy.tokens(batch, mean)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        training = self.policy.training
        self.policy.eval()
        with ExitStack() as stack:
            stack.callback(self.policy.train, training)
            if self.initial is None:
                stack.enter_context(self.policy.attachment.disabled())
            else:
                stack.enter_context(swapped(self.policy.attachment.moving(), self.initial))
            yield


def checkpointed(model: Any) -> None:
    """Recompute blocks in the backward pass, in the same layout as they ran."""
    contexts = functools.partial(attention.checkpoint_contexts, model)
    # transformers renamed it on the way
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


def frozen_copy(attachment: Attachment) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in attachment.moving().items()}
