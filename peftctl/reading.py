"""How a file is read that is measured: as a run's recipe read its data, where it is not told otherwise. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, get_args

from peftctl import metrics, objectives
from peftctl import recipe as recipes
from peftctl.data.mixing import Wanted, wanted
from peftctl.errors import InputError, suggest
from peftctl.objectives.base import Objective
from peftctl.schema import DataConfig, Recipe

MOST = 4096  # tokens of a row, where nothing says it
NONE = "none"  # in place of metrics


class Reading(NamedTuple):
    """`recipe`: the file that says so, where one does. `keys`: of the objective's block. `now`: what chat templates are
    told, None for the present moment.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    max_length: int = MOST
    truncate: str = "refuse"
    on_bad_row: str = "error"
    keys: Mapping[str, Any] = {}
    now: datetime | None = None
    recipe: Path | None = None

    def keys_of(self, objective: Objective[Any]) -> dict[str, Any]:
        """The keys that an objective takes of these."""
        return {key: value for key, value in self.keys.items() if key in objective.reading}


PLAIN = Reading()


def reading_of(
    path: str,
    file: str | Path,
    *,
    format: str | None = None,
    columns: Sequence[str] = (),
    max_length: int | None = None,
    truncate: str | None = None,
    asked: Sequence[str] = (),
    max_new_tokens: int | None = None,
) -> Reading:
    """How `file` is read for what lies at `path`, a run perhaps. `columns`: `OURS=THEIRS` each; `asked`: metrics.

    Raises InputError for an option that makes no sense, RecipeError where the run's recipe cannot be read.
    """
    found = _of_run(Path(path), Path(file)) if (Path(path) / "run.json").is_file() else PLAIN
    keys, names = dict(found.keys), [name for one in asked for name in one.split(",") if name]
    if names:
        chosen = [] if names == [NONE] else list(dict.fromkeys(names))
        metrics.check(chosen, "--metrics")
        keys["metrics"] = chosen
    if max_new_tokens is not None:
        keys["max_new_tokens"] = max_new_tokens
    known = get_args(DataConfig.model_fields["truncate"].annotation)
    if truncate is not None and truncate not in known:
        raise InputError(f"--truncate {truncate}: one of {', '.join(known)} is meant{suggest(truncate, known)}")
    if keys.get("metrics") and (truncate or found.truncate) == "right":
        raise InputError("--metrics compares whole answers, which --truncate right cuts off: left keeps them")
    given: dict[str, Any] = {
        "format": format,
        "max_length": max_length,
        "truncate": truncate,
        "columns": _columns(columns) or None,
    }
    return found._replace(keys=keys, **{key: value for key, value in given.items() if value is not None})


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--column {pair}: write our name, then the file's, as completion=answer")
        found[ours] = theirs
    return found


def _of_run(folder: Path, file: Path) -> Reading:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return PLAIN
    recipe = recipes.load(path)
    data, objective = recipe.data, objectives.get(recipe.objective.name)
    format, columns = _written(recipe, file) if _measured(objective) else ("auto", None)
    keys = {key: getattr(recipe.objective, key) for key in objective.reading}
    limits = (data.max_length, data.truncate, data.on_bad_row)
    return Reading(format, columns, *limits, keys, _now(folder / "run.json"), path)


def _measured(objective: Objective[Any]) -> bool:
    """Whether what it learns from is what a loss or a head is measured on; of pairs a language model has no loss."""
    likely = [one for one in map(objectives.get, objectives.names()) if one.likelihood]
    return objective.task != "causal-lm" or any(objective.kinds & one.kinds for one in likely)


def _written(recipe: Recipe, file: Path) -> tuple[str, Mapping[str, str] | None]:
    """Format and columns of a file: those of the source that it is, or else what holds for all sources alike."""
    data = recipe.data
    held = () if data.validation is None or isinstance(data.validation, float) else wanted(data.validation)
    sources = [*wanted(data.train), *held]

    def of(source: Wanted) -> tuple[str, Mapping[str, str] | None]:
        return source.format or data.format, data.columns if source.columns is None else source.columns

    own = [one for one in sources if one.path is not None and Path(one.path).resolve() == file.resolve()]
    found = [of(one) for one in own or sources]
    return found[0] if all(one == found[0] for one in found) else (data.format, data.columns)


def _now(path: Path) -> datetime | None:
    try:
        return datetime.fromisoformat(json.loads(path.read_bytes())["choices"]["now"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
