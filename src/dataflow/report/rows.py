"""The tables of a run, read into entries: every picture once, and every row that has none, with what became of it.

Tables are read from the last step back to the first. What stands in the last table was kept, with everything that was
ever said of it; a picture that is met for the first time in an earlier table was lost in the step after that. So one
look at each picture is enough, and all that is held in memory is which ones were met.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dataflow.errors import InputError
from dataflow.operators.rows import user_turns
from dataflow.report.entries import Entry, Tally, Value, digest_of, paths_in, picture_key, scalars, score_of
from dataflow.report.runs import Run, Step, look, plain_json, rows_of
from dataflow.runtime.journal import Journal
from dataflow.scores import score_columns
from dataflow.types import BadRow, Row

_PROMPTS = ("conversations", "prompt", "caption", "text", "instruction", "edit")
_DEFAULT_IMAGES = {"EditEvaluator": "edited_images"}
_SUFFIXES = ("_status", "_error", "_by", "_turns")


class RunReader:
    """Reads one run.

    Args:
        run: its steps.
        prompt_column: column with the prompt; empty for the likeliest.
        text_limit: characters of a cell that are kept as text.

    Attributes:
        tally: filled while :meth:`entries` is read.
        notes: what could not be read, for people.
    """

    def __init__(self, run: Run, *, prompt_column: str = "", text_limit: int = 4000) -> None:
        self.run = run
        self.tally = Tally()
        self.notes: list[str] = []
        self._text_limit = text_limit
        self._rows = 0
        self._seen: dict[bytes, int] = {}
        self._lacking: Counter[bytes] = Counter()
        self._first_seen: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self._scored: dict[str, str] = {}
        self._sources: list[str] = []
        self._survey()
        self._prompt_column = (
            prompt_column or self._named_prompt() or next((name for name in _PROMPTS if name in self._first_seen), "")
        )

    # What the columns are

    def _survey(self) -> None:
        """Which step made which column; which columns hold pictures; which scores are of which of them."""
        tables = [(0, self.run.steps[0].source, "")]
        tables += [(step.number, step.table, step.operator) for step in self.run.steps]
        made_pictures = {step.number: _makes_pictures(step) for step in self.run.steps}
        given: list[str] = []
        for number, table, operator in tables:
            rows = look(table)
            for row in rows:
                for name, value in row.items():
                    self._first_seen.setdefault(name, number)
                    if name.endswith(_SUFFIXES) or not paths_in(value):
                        continue
                    made = self._first_seen[name]
                    if made == 0 and name not in given and not number:
                        given.append(name)
                    elif name not in given and name not in self._columns:
                        step = number if made == 0 else made  # a placeholder of the input was filled here
                        if made_pictures.get(step):
                            self._columns[name] = step
            for row in rows:
                for name in score_columns(row):
                    self._scored.setdefault(name, self._scored_column(number, operator, given))
        if not self._columns:
            self._columns, given = dict.fromkeys(given, 0), []
        self._sources = given

    def _scored_column(self, number: int, operator: str, given: Sequence[str]) -> str:
        step = next((step for step in self.run.steps if step.number == number), None)
        named = step.settings.get("input_image_key") if step else None
        default = _DEFAULT_IMAGES.get(operator, "images")
        known = [*self._columns, *given]
        if isinstance(named, str):
            return named
        return default if default in known else next(iter(reversed(known)), "")

    def _named_prompt(self) -> str:
        """What the first step that makes pictures reads: what comes later are instructions for those."""
        first = next((step for step in self.run.steps if step.settings and _makes_pictures(step)), None)
        named = first.settings.get("input_conversation_key", _PROMPTS[0]) if first else ""
        return named if named in self._first_seen else ""

    @property
    def scores(self) -> tuple[str, ...]:
        """The columns that hold scores."""
        return tuple(self._scored)

    # Reading

    def entries(self) -> Iterator[list[Entry]]:
        """The entries of one row after the other: what was kept first, then what each step lost, the last step first.

        Raises:
            InputError: a table cannot be read.
        """
        steps = self.run.steps
        last = self.run.last
        for step in reversed(steps):
            if step.table is None:
                yield from self._unfinished(step)
        following: Step | None = None
        for step in reversed([each for each in steps if each.table is not None]):
            if step is last or (following is not None and following.folds_only):
                yield from self._table(step, following)
            yield from self._sidecar(step)
            following = step

    def _table(self, step: Step, lost_in: Step | None) -> Iterator[list[Entry]]:
        assert step.table is not None
        missing: Counter[bytes] = Counter()
        for row in rows_of(step.table):
            if isinstance(row, BadRow):
                self.notes.append(f"{step.table}: a line that is no row was left out: {row.error}")
                continue
            if lost_in is None:
                yield from self._row(row, "kept", 0, "", "")
                continue
            if not any(digest_of(path) in self._seen for _, path in self._pictures(row)):
                key = self._likeness(row)
                missing[key] += 1
                if missing[key] <= self._lacking[key]:
                    continue  # a row that never had a picture, met in a later table already
            yield from self._row(row, "not_chosen", lost_in.number, "", "", lost_in)

    def _sidecar(self, step: Step) -> Iterator[list[Entry]]:
        if not step.dropped.is_file():
            return
        for record in rows_of(step.dropped):
            if isinstance(record, BadRow):
                self.notes.append(f"{step.dropped}: a line that is no row was left out: {record.error}")
                continue
            reason = str(record.get("reason", "dropped"))
            row = record.get("row")
            if isinstance(row, dict) and reason != "reserved_column":
                details = {name: value for name, value in record.items() if name not in ("reason", "row")}
                message = plain_json(details, self._text_limit) if details else ""
                yield from self._row(row, "dropped", step.number, reason, message)
            else:
                self.tally.rows[step.number, "failed", reason] += 1
                raw = plain_json(record.get("raw", row), self._text_limit)
                message = str(record.get("error", ""))
                yield [self._entry({}, "failed", step.number, reason, message, facts={"raw": raw})]

    def _unfinished(self, step: Step) -> Iterator[list[Entry]]:
        """What the journal of a step says that has no table yet: it knows requests, not rows."""
        index = Journal(step.journal).load() if step.journal.is_dir() else None
        if index is None:
            return
        for key in index.packed:
            for place, name in enumerate(index.names(key)):
                entry = self._entry({}, "waiting", step.number, "unfinished", "the step has not finished")
                entry.path, entry.made, entry.place = name, step.number, place
                self.tally.made[step.number] += 1
                self.tally.pictures[step.number, "waiting", "unfinished"] += 1
                yield [entry]
        for key, ending in index.endings.items():
            self.tally.rows[step.number, ending.status, ending.reason] += 1
            facts = {"request_id": key.hex()}
            yield [self._entry({}, ending.status, step.number, ending.reason, ending.message, facts=facts)]

    # Rows

    def _row(
        self, row: Row, state: str, step: int, reason: str, message: str, lost_in: Step | None = None
    ) -> Iterator[list[Entry]]:
        """The entries of a row that were not met yet."""
        found = self._pictures(row)
        known = [self._seen[digest] for _, path in found if (digest := digest_of(path)) in self._seen]
        number = known[0] if known else self._rows
        new = [(spot, path) for spot, path in found if digest_of(path) not in self._seen]
        errors = [] if known else self._errors(row)
        lacks: tuple[int, str] | None = None
        if not known:
            self._rows += 1
            if not found:
                self._lacking[self._likeness(row)] += 1
            lacks = self._count_row(found, errors, state, step, reason, lost_in)
            if lacks and state == "kept":
                state, step, reason = "incomplete", *lacks
        if not new and not errors and (known or state == "kept"):
            return
        if state == "incomplete":
            message = "a later step could not make what its row asked for"
        shared = self._shared(row)
        entries = []
        for (column, place, turn), path in new:
            digest = digest_of(path)
            if digest in self._seen:
                continue
            self._seen[digest] = number
            entry = self._picture(row, column, place, turn, path, shared)
            entry.row, entry.state, entry.step, entry.reason, entry.message = number, state, step, reason, message
            if lost_in is not None:
                entry.reason, entry.message = _why_not_chosen(lost_in, entry)
            self.tally.made[entry.made] += 1
            if state == "kept":
                self.tally.kept_pictures += 1
            else:
                self.tally.pictures[step, state, entry.reason] += 1
            entries.append(entry)
        for made, column, error in errors:
            status = str(error["status"])
            entry = self._entry(row, status, made, str(error.get("reason", "")), str(error.get("message", "")), shared)
            entry.row, entry.column = number, column
            entries.append(entry)
        if not entries:
            entry = self._entry(row, state, step, reason or "no_picture", message, shared)
            entry.row = number
            entries.append(entry)
        yield entries

    def _count_row(
        self,
        found: Sequence[tuple[tuple[str, int, int], str]],
        errors: Sequence[tuple[int, str, Mapping[str, Any]]],
        state: str,
        step: int,
        reason: str,
        lost_in: Step | None,
    ) -> tuple[int, str] | None:
        """Every row is lost once: where it was first without a picture it had asked for; returns that step and why."""
        columns = {column for (column, _, _), _ in found}
        bare = [each for each in errors if each[1] not in columns]
        if bare:
            made, _, error = min(bare, key=lambda each: each[0])
            why = str(error.get("reason", ""))
            self.tally.rows[made, str(error["status"]), why] += 1
            return made, why
        if state == "kept":
            self.tally.kept += 1
        else:
            self.tally.rows[step, state, reason or ("not_in_next_table" if lost_in else "")] += 1
        return None

    def _pictures(self, row: Row) -> list[tuple[tuple[str, int, int], str]]:
        """(column, place, turn) and path of every picture that the run made for a row."""
        found: list[tuple[tuple[str, int, int], str]] = []
        for column in self._columns:
            turns = row.get(f"{column}_turns")
            if isinstance(turns, list):
                for place, sample in enumerate(turns):
                    paths = paths_in(sample)
                    found += [((column, place, turn), path) for turn, path in enumerate(paths, 1)]
            listed = {path for _, path in found}
            paths = [path for path in paths_in(row.get(column)) if path not in listed]
            found += [((column, place, 0), path) for place, path in enumerate(paths)]
        return found

    def _errors(self, row: Row) -> list[tuple[int, str, Mapping[str, Any]]]:
        """(step, column, error) of every column that a generator could not fill."""
        found = []
        for name, value in row.items():
            column = name.removesuffix("_error")
            if column == name or not isinstance(value, dict) or value.get("status") not in ("refused", "failed"):
                continue
            made = self._columns.get(column) or self._first_seen.get(name) or self._first_seen.get(column) or 1
            found.append((made, column, value))
        return found

    def _likeness(self, row: Row) -> bytes:
        """What a row without pictures is known by in the tables before: its cells of the first table."""
        own = {
            name: value for name, value in row.items() if self._first_seen.get(name) == 0 and name not in self._columns
        }
        text = json.dumps(own or self._prompt(row), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()

    # Entries

    def _shared(self, row: Row) -> dict[str, Any]:
        """What all entries of a row have in common."""
        prompt = self._prompt(row)
        sources = [path for column in self._sources for path in paths_in(row.get(column))]
        values: dict[tuple[str, str], Value | bool] = {}
        facts: dict[str, str] = {}
        scored = set(score_columns(row))
        for name, value in row.items():
            if name == self._prompt_column or name in self._columns or name.endswith("_turns"):
                continue
            if name in scored or name.removesuffix("_status") in scored or name.removesuffix("_by") in scored:
                continue
            if name.removesuffix("_error") in scored:
                continue
            facts[name] = plain_json(value, self._text_limit)
            values.update(scalars("row", name, value))
        for name in scored:
            error = row.get(f"{name}_error")
            if error and not isinstance(error, list):
                facts[f"{name}_error"] = plain_json(error, self._text_limit)
        group = json.dumps([prompt, *map(picture_key, sources)], default=str) if prompt or sources else ""
        return {"prompt": prompt, "group": group, "values": values, "facts": facts, "sources": sources}

    def _entry(
        self,
        row: Row,
        state: str,
        step: int,
        reason: str,
        message: str,
        shared: Mapping[str, Any] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> Entry:
        shared = shared or (self._shared(row) if row else {"prompt": "", "group": "", "values": {}, "sources": []})
        number = self._rows
        if not row:
            self._rows += 1
        return Entry(
            row=number,
            state=state,
            step=step,
            reason=reason,
            message=message[: self._text_limit],
            prompt=shared["prompt"],
            group=shared["group"],
            values=dict(shared["values"]),
            facts={**shared.get("facts", {}), **(facts or {})},
            sources=shared["sources"],
        )

    def _picture(self, row: Row, column: str, place: int, turn: int, path: str, shared: Mapping[str, Any]) -> Entry:
        entry = self._entry(row, "", 0, "", "", shared)
        entry.column, entry.made, entry.place, entry.turn, entry.path = column, self._columns[column], place, turn, path
        turns = row.get(f"{column}_turns")
        final = not turn or not isinstance(turns, list) or turn == len(paths_in(turns[place]))
        for name in score_columns(row):
            if self._scored.get(name) != column or not final:
                continue
            entry.scores[name], by = score_of(row, name, place), row.get(f"{name}_by")
            entry.scored_by[name] = by if isinstance(by, str) else ""
            value, status, _ = entry.scores[name]
            if status == "ok":
                entry.values.update(scalars("score", name, value))
            else:
                entry.values["score", f"{name} (why there is none)"] = status
        return entry

    def _prompt(self, row: Row) -> str:
        try:
            return "\n".join(user_turns(row, self._prompt_column))
        except InputError:
            return ""


def _makes_pictures(step: Step) -> bool:
    """A generator: its sum counts images, or it stopped before it had one."""
    return bool(step.summary.get("images")) or not step.summary


def _why_not_chosen(step: Step, entry: Entry) -> tuple[str, str]:
    """What a filter had against a picture whose row it kept, as far as its settings tell."""
    conditions = step.thresholds
    score = conditions.get("score")
    value = entry.values.get(("score", score)) if isinstance(score, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = conditions.get("minimum"), conditions.get("maximum")
        if isinstance(least, int | float) and value < least:
            return f"score:{score}", f"{score} is {value:.4g}, less than {least:g}"
        if isinstance(most, int | float) and value > most:
            return f"score:{score}", f"{score} is {value:.4g}, more than {most:g}"
        if "top_k" in conditions:
            return f"best:{score}", f"not among the best {conditions['top_k']} of its row by {score} ({value:.4g})"
    return "not_chosen", f"{step.operator or step.name} kept other pictures of its row"
