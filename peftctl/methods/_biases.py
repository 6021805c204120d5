"""Biases whose change can be added to the output of their module."""

from __future__ import annotations

from peftctl.errors import TargetError
from peftctl.skeleton import LINEAR, Module, Skeleton, dotted

SERVED = LINEAR | {"Norm"}  # where adding to the output is adding to the bias


def biased(skeleton: Skeleton, key: str) -> list[Module]:
    """Every module with a bias. Raises TargetError, blaming the recipe's `key`, for one that cannot be served."""
    found = [m for m in skeleton.modules if "bias" in m.shapes]
    strange = [m for m in found if m.kind not in SERVED and not _alias(skeleton, m)]
    if strange:
        raise TargetError(
            f"{key}: {strange[0].path} of {skeleton.architecture} is a {strange[0].type}, whose bias cannot be served"
        )
    return [m for m in found if m.kind in SERVED]


def _alias(skeleton: Skeleton, module: Module) -> bool:
    """Whether a module's bias is applied by a linear elsewhere (BERT's `cls.predictions` holds its decoder's)."""
    return dotted(module.path, "bias") in skeleton.tied.values()
