"""What a run's policy is compared with: itself at step 0, the base, another adapter of the same method, or a model."""

from __future__ import annotations

import torch
from torch import Tensor

from peftctl import methods, objectives
from peftctl import model as models
from peftctl.base import Base
from peftctl.checkpoint import State
from peftctl.compute import Precision
from peftctl.errors import InputError
from peftctl.formats.peft import Adapter
from peftctl.kernels.stored import computed_type
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.plan import Plan
from peftctl.policy import Policy, Reference, frozen_copy
from peftctl.surgery import device_of, without_dropout


def reference_of(
    planned: Plan, policy: Policy, start: dict[str, Tensor], state: State | None, *, trust_remote_code: bool = False
) -> Reference | None:
    """By the switch where it is the base, else by a frozen set of deltas, or by a policy of its own where it is another
    model; None where the objective needs none.

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
    if isinstance(planned.reference, Base):
        return Reference(_other(planned.reference, planned, policy, trust_remote_code), None)
    if state is not None and state.reference is not None:
        device = next(iter(start.values())).device
        return Reference(policy, {name: tensor.to(device) for name, tensor in state.reference.items()})
    if planned.reference is not None:
        return Reference(policy, _frozen(policy.attachment, planned.reference))
    return Reference(policy, start)


def _other(base: Base, planned: Plan, policy: Policy, trust_remote_code: bool) -> Policy:
    """Another model, on the policy's device, by the same kernels."""
    settings, wanted = planned.recipe.train, planned.recipe.model
    device = str(device_of(policy.model))
    computed = str(computed_type(policy.model)).removeprefix("torch.")
    precision = Precision(wanted.dtype, computed)
    model = models.load(base, precision, device, settings.seed, trust_remote_code=trust_remote_code)
    without_dropout(model)
    layers = models.skeleton(base, trust_remote_code=trust_remote_code).dimensions.layers
    other = policy_of(model, None, layers, wanted.layout)
    if settings.fuse:
        other.fuse(pack=policy.packed)
    other.exact_logits()
    return other.eval()


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
