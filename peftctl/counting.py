"""What a recipe would train, counted on the skeleton: no weight is read."""

from __future__ import annotations

from typing import Any, NamedTuple

from peftctl.base import Base
from peftctl.methods.base import Method, MethodConfig
from peftctl.methods.whole import saved
from peftctl.model import skeleton


class Counts(NamedTuple):
    """Numbers of parameters. `trainable` is adapter and saved modules; `total` is base and trainable."""

    adapter: int
    saved_modules: int
    trainable: int
    base: int
    total: int
    percent: float  # trainable of total
    summary: str
    places: dict[str, int]

    def document(self, by_module: bool) -> dict[str, Any]:
        found = self._asdict()
        places = found.pop("places")
        return found | ({"by_module": places} if by_module else {})


def count(base: Base, method: Method[Any], config: MethodConfig, *, trust_remote_code: bool = False) -> Counts:
    """Raises TargetError where the method cannot serve the base."""
    table = skeleton(base, trust_remote_code=trust_remote_code)
    counted = method.count(table, config)
    whole = saved(table, config.save_modules, counted.places).sizes(table)
    own, beside, total = counted.total, sum(whole.values()), table.parameters()
    trainable = own + beside
    percent = 100 * trainable / (trainable + total)
    places = counted.places | whole
    return Counts(own, beside, trainable, total, trainable + total, percent, counted.summary, places)
