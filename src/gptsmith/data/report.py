"""Reports on files while they are read: skipped records, hints for the user, progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptsmith.data.options import OnError

_SHOWN = 3  # places that a line of the report lists


class Tally:
    """Counts places by kind and keeps the first few of each kind.

    A place counts once per kind, even if its file is read repeatedly.
    """

    def __init__(self) -> None:
        self._places: dict[str, dict[int, str]] = {}  # by kind and hash; "" after the first few

    def add(self, kind: str, place: str) -> None:
        """Count `place` under `kind`."""
        seen = self._places.setdefault(kind, {})
        seen.setdefault(hash(place), place if len(seen) < _SHOWN else "")

    def __getitem__(self, kind: str) -> int:
        return len(self._places.get(kind, ()))

    @property
    def total(self) -> int:
        return sum(map(len, self._places.values()))

    def counts(self) -> dict[str, int]:
        """The number of places of each kind, sorted by kind."""
        return {kind: self[kind] for kind in sorted(self._places)}

    def lines(self) -> list[str]:
        """Kind, count and first places, one line per kind in order of appearance."""
        lines = []
        for kind, seen in self._places.items():
            shown = [*filter(None, seen.values()), *(["..."] if len(seen) > _SHOWN else [])]
            lines.append(f"{kind}: {len(seen):,} ({', '.join(shown)})")
        return lines

    def clear(self) -> None:
        self._places.clear()


class ReadReport:
    """Handles records that cannot be used, and collects hints for the user.

    on_error   stop with a ValueError, or skip and count; None: stop, without mentioning --on-error,
               which the command does not have
    skipped    skipped records, by kind
    hints      hints for the user, without repetitions, in order
    position   bytes read so far, over all files of `starts`
    read       records of each file (rows; lines of a text file), skipped ones included
    """

    def __init__(self, on_error: OnError | None = None) -> None:
        self.on_error = on_error
        self.skipped = Tally()
        self.hints: dict[str, None] = {}
        self.starts: dict[Path, int] = {}  # total bytes of the files before each file
        self.position = 0
        self.read: dict[Path, int] = {}

    @property
    def skips(self) -> bool:
        return self.on_error == "skip"

    def reject(self, kind: str, place: str, problem: str) -> None:
        """Skip a record and count it under `kind`, or raise ValueError with the problem."""
        if not self.skips:
            remedy = "; --on-error skip skips such records" if self.on_error else ""
            raise ValueError(f"{place}: {problem}{remedy}")
        self.skipped.add(kind, place)

    def share(self, skipped: int) -> str:
        """A number of skipped records with its share: "12 of 512 records (2.3%)"."""
        plural = "" if skipped == 1 else "s"
        total = sum(self.read.values()) + self.skipped["empty file"]
        if total < skipped:  # not counted, as in a stream of the Hub
            return f"{skipped:,} record{plural}"
        return f"{skipped:,} of {total:,} records ({skipped / max(1, total):.1%})"

    def lines(self) -> list[str]:
        """What was skipped: the share of all records, then one line per kind."""
        if not self.skipped.total:
            return []
        kinds = [f"skipped, {line}" for line in self.skipped.lines()]
        return [f"skipped {self.share(self.skipped.total)}", *kinds]

    def usage(
        self, rows: int, left_out: Sequence[str], kept: str, is_one: bool, remarks: Tally
    ) -> str:
        """How a data set is used: first what is left out, then what is trained on.

        rows: that were not skipped. left_out: why some of them, or parts of them, are not used.
        kept: what is trained on, and whether it is one thing; "" for nothing.
        """
        parts = [*left_out]
        if skipped := self.skipped.total:
            total, lines = rows + skipped, ", ".join(self.skipped.lines())
            parts.append(f"skipped: {skipped:,} of {total:,} rows ({skipped / total:.1%}), {lines}")
        if kept:
            which, are = ("", "is") if is_one else ("" if left_out else "all ", "are")
            parts.append(f"{which}{kept} {are} trained on")
        elif not parts:
            parts.append("there are no rows")
        return "; ".join([*parts, *remarks.lines(), *self.hints])

    def hint(self, text: str) -> None:
        self.hints[text] = None

    def reached(self, path: Path, offset: int) -> None:
        """Record that a file has been read up to byte `offset`."""
        self.position = self.starts.get(path, 0) + offset
