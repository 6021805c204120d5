"""What a run's policy is compared with: itself at step 0, the base, or another adapter of the same method."""

from __future__ import annotations

import torch
from torch import Tensor

from peftctl import methods, objectives
from peftctl.checkpoint import State
from peftctl.errors import InputError
from peftctl.formats.peft import Adapter
from peftctl.methods.attachment import Attachment
from peftctl.plan import Plan
from peftctl.policy import Policy, Reference, frozen_copy


def reference_of(planned: Plan, policy: Policy, start: dict[str, Tensor], state: State | None) -> Reference | None:
    """By the switch where it is the base, else by a frozen set of deltas; None where the objective needs none.

    `start`: what is trained, as it is at step 0. A resumed run gets its reference from the checkpoint. Raises
    InputError for an adapter that does not fit.
    """
    recipe = planned.recipe
    kind = objectives.get(recipe.objective.name).reference(recipe.objective)
    if kind is None:
        return None
    identity = methods.get(recipe.method.name).traits(recipe.method).starts_as_identity
    if kind == "base" or (kind == "initial" and identity and planned.start is None):
        return Reference(policy, None)
    if state is not None and state.reference is not None:
        device = next(iter(start.values())).device
        return Reference(policy, {name: tensor.to(device) for name, tensor in state.reference.items()})
    if planned.reference is not None:
        return Reference(policy, _frozen(policy.attachment, planned.reference))
    return Reference(policy, start)


def _frozen(attachment: Attachment, adapter: Adapter) -> dict[str, Tensor]:
    """The values that an adapter has for what is trained."""
    own = {name: tensor.clone() for name, tensor in attachment.tensors().items()}
    attachment.load(adapter.tensors, f"objective.reference {adapter.folder}")
    values, loaded = frozen_copy(attachment), attachment.tensors()
    other = [name for name in own if name not in values and not torch.equal(loaded[name], own[name])]
    attachment.load(own)
    if other:
        raise InputError(f"objective.reference: {adapter.folder} has other values of {other[0]}, which is not trained")
    return values
