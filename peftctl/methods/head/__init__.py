"""The task's head alone, over a base that stays as it is: what adapters must be better than."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.errors import TargetError
from peftctl.methods.base import Counted, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class HeadConfig(MethodConfig):
    pass


def _count(skeleton: Skeleton, config: HeadConfig) -> Counted:
    if not skeleton.added:
        raise TargetError(
            f"method.name: head trains a task's head alone, and {skeleton.architecture} has none: set model.task, and "
            "an objective such as classification"
        )
    return Counted({}, "the head alone")  # it is counted with what is saved beside any method


def _attach(model: nn.Module, config: HeadConfig) -> Attachment:
    from peftctl.methods.attachment import Attachment
    from peftctl.surgery import skeleton

    _count(skeleton(model), config)
    return Attachment()


METHOD = Method(
    name="head",
    summary="a task's head alone: what adapters are compared with",
    paper="https://arxiv.org/abs/1610.01644",
    config=HeadConfig,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
)
