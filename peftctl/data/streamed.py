"""Sources that are streamed, before training: their first rows, what is held out of them, and what reads the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.data.cache import Made
from peftctl.data.encoded import Dataset, Report, listed
from peftctl.data.encoding import Tokenizer
from peftctl.data.gathering import Progress, Tally, gathered, job_for
from peftctl.data.mixing import Wanted, every_size, held_out, joined, summed
from peftctl.data.parallel import chunks
from peftctl.data.reading import HEAD, Reading
from peftctl.data.sources import Part, files, place, shown
from peftctl.data.sources.hub import Hub
from peftctl.data.stream import Feed, Mixed, Rows, Stream, Windows
from peftctl.objectives.base import Objective


class Streamed(NamedTuple):
    """`samples`: the first rows of each source, checked as all are elsewhere, less those that are `held` out."""

    samples: list[Dataset]
    held: list[Dataset]
    report: Report
    feeds: tuple[Feed, ...]
    stream: Stream


def parts_of(source: str | Path | Hub) -> Sequence[Part]:
    return [source] if isinstance(source, Hub) else files(source)


def name_of(source: str | Path | Hub) -> str:
    return source.shown if isinstance(source, Hub) else shown(Path(source))


def streamed(
    recipe: Any,
    sources: Sequence[Wanted],
    chat: Tokenizer,
    objective: Objective[Any],
    vocabulary: int | None,
    progress: Progress,
) -> Streamed:
    """The sources of a recipe. Raises DataError for what is wrong with their first rows.

    Where `data.validation` is a share, it is held out of each source's first rows, as many as are in memory anyway, so
    that no more has to be read for it.
    """
    data, seed = recipe.data, recipe.train.seed
    share = data.validation if isinstance(data.validation, float) else None
    first = HEAD if share is None else max(HEAD, data.shuffle_buffer)
    begun = [_begun(one, first, recipe, chat, objective, vocabulary, progress) for one in sources]
    feeds, samples, reports = zip(*begun, strict=True)
    report = reports[0] if len(reports) == 1 else summed(reports, every_size(samples))
    stay, held = (list(samples), list[Dataset]()) if share is None else held_out(samples, share, seed)
    told = joined(samples)
    stream = Stream(
        told.name,
        told.fingerprint,
        _rows(feeds, [one.weight for one in sources if one.weight is not None], seed, data.shuffle_buffer),
        seed,
        skip=data.on_bad_row == "skip",
        held=[where for own in held for where in own.places],
        pair=objective.pair,
    )
    return Streamed(stay, held, report, feeds, stream)


def whole(found: Streamed, held: Dataset | None, on_bad_row: str, progress: Progress) -> tuple[Report, int]:
    """The report on all rows, each encoded once and none kept; and how many held-out examples are trained on as well.

    Raises DataError.
    """
    own = listed(held.examples if held is not None else ())
    digests = [own.digest(index) for index in range(len(own))]
    asked, met, sizes, reports = {*digests}, set[int](), Counter[int](), list[Report]()
    for feed in found.feeds:
        reading, tally = Reading(feed.name, feed.parts, feed.limit), Tally(feed.job)
        stems = [part.stem for part in feed.parts]
        for chunk in chunks(feed.job, reading.batches([]), reading.long):
            tally.add(chunk)
            for digest, code in zip(chunk.packed.digests, chunk.packed.places, strict=True):
                if digest in asked and place(stems, code) not in found.stream.held:
                    met.add(digest)
            progress(feed.name, tally.counts["read"], reading.expected())
        reports.append(tally.report(reading, on_bad_row))
        sizes.update(tally.sizes)
    leaked = sum(digest in met for digest in digests)
    return reports[0] if len(reports) == 1 else summed(reports, sizes), leaked


def _rows(feeds: Sequence[Feed], weights: Sequence[float], seed: int, window: int) -> Rows:
    """The feeds one after the other or, where they have weights, mixed."""
    if not weights:
        return Windows(feeds, seed, window)
    return Mixed([Windows([feed], seed, window) for feed in feeds], [feed.name for feed in feeds], weights, seed)


def _begun(
    one: Wanted,
    first: int,
    recipe: Any,
    chat: Tokenizer,
    objective: Objective[Any],
    vocabulary: int | None,
    progress: Progress,
) -> tuple[Feed, Dataset, Report]:
    """A source with its first rows, and the report on them."""
    data, parts, name = recipe.data, parts_of(one.place), name_of(one.place)
    limit = one.limit or data.limit
    reading = Reading(name, parts, first if limit is None else min(first, limit))
    head, content = reading.head(), bytearray()
    columns = data.columns if one.columns is None else one.columns
    written = (one.format or data.format, columns, data.max_length, data.truncate, vocabulary)
    feed = Feed(name, parts, job_for(name, head, chat, objective, recipe.objective, *written), limit)
    packed, report = gathered(feed.job, reading, head, data.on_bad_row, content.extend, progress)
    made = Made(packed, report, tuple(part.stem for part in parts), feed.fingerprint)
    return feed, *made.loaded(lambda start, end: bytes(memoryview(content)[start:end]))
