"""Which requests are handed out together, which apart, and which not at all."""

from __future__ import annotations

import itertools

import pytest

from dataflow.errors import ImageError, InputError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import Ending
from dataflow.runtime.planner import DEADLY_STARTS, SUSPECT_STARTS, Planner, RowBook
from dataflow.runtime.table import journal_folder
from dataflow.runtime.tally import Tally
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import GenerationRequest, Outcome

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def planner(job):
    """Make a planner of the job as it stands."""
    journals = []

    def make(serving: FakeServing | None = None, retry: frozenset[str] | None = None) -> Planner:
        serving = serving or job.serving()
        storage = job.storage()
        journal = job.journal
        assert journal.folder == journal_folder(storage)
        index = job.index()
        journal.open()
        journals.append(journal)
        identifier = Identifier(serving, 0, resolve=storage.resolve, digest=job.io.digest)
        plan = Text2ImageGenerator(serving).plan(input_conversation_key="prompt")
        return Planner(plan, storage, serving, identifier, index, journal, Tally(), retry)

    yield make
    for journal in journals:
        journal.close()


def batches(planner: Planner) -> list[list[GenerationRequest]]:
    """All batches, each one ended before the next is asked for."""
    found = []
    while (batch := planner.next_batch()) is not None:
        found.append(batch)
        for request in batch:
            planner.parent_ended(request, Outcome(request_id=request.request_id, status="done"))
    return found


def prompts(found: list[list[GenerationRequest]]) -> list[list[str]]:
    return [[request.prompt for request in batch] for batch in found]


def died_with(job, prompt: str, times: int, *, alone: bool = False) -> None:
    """A process was killed so often while it had this prompt in hand."""
    serving = job.serving()
    identifier = Identifier(serving, 0, resolve=job.storage().resolve, digest=job.io.digest)
    draft = Text2ImageGenerator(serving).plan(input_conversation_key="prompt").requests({"prompt": prompt})
    key = identifier.identify(draft)[0].key.hex()
    journal = job.journal
    journal.open()
    for _ in range(times):
        journal.append({"s": "start", "ks": [key], **({"alone": True} if alone else {})})
    journal.close()


class TestBatches:
    def test_full_batches_in_the_order_of_the_table_and_the_rest_at_the_end(self, job, planner):
        job.prompts(*"abcdefg")
        assert prompts(batches(planner(job.serving(batch_size=3)))) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]

    def test_a_batch_holds_only_what_may_share_one(self, job, planner):
        sizes = itertools.cycle([(8, 8), (16, 8), (8, 16)])
        job.rows(*({"prompt": str(i), "width": w, "height": h} for i, (w, h) in zip(range(20), sizes, strict=False)))
        found = batches(planner(job.serving(batch_size=4)))
        assert all(len({request.size for request in batch}) == 1 for batch in found)
        assert sorted(map(len, found)) == [2, 3, 3, 4, 4, 4]
        assert len({request.request_id for batch in found for request in batch}) == 20

    def test_the_table_is_read_only_as_far_as_a_batch_needs(self, job, planner):
        job.prompts(*(f"p{i}" for i in range(5000)))
        plan = planner(job.serving(batch_size=8))
        plan.next_batch()
        assert plan.tally.planned == 8

    def test_a_table_of_odd_sizes_is_not_read_to_its_end_for_a_full_batch(self, job, planner):
        job.rows(*({"prompt": str(i), "width": i + 1, "height": 8} for i in range(3000)))
        plan = planner(job.serving(batch_size=8))
        assert len(plan.next_batch()) == 1
        assert plan.tally.planned < 500

    def test_after_a_batch_did_not_fit_those_of_its_kind_are_smaller(self, job, planner):
        job.rows(*({"prompt": str(i), "width": 8 * (1 + i % 2), "height": 8} for i in range(40)))
        plan = planner(job.serving(batch_size=8))
        first = plan.next_batch()
        plan.shrink(first[0], 4)
        plan.shrink(first[0], 6)
        plan.shrink(first[0], 2)
        kinds: dict = {}
        for batch in batches(plan):
            kinds.setdefault(batch[0].size, []).append(len(batch))
        assert max(kinds.pop(first[0].size)) == 2
        assert list(kinds.values()) == [[8, 8, 4]]

    def test_when_the_run_stops_nothing_more_is_handed_out(self, job, planner):
        job.prompts("a", "b")
        plan = planner()
        assert plan.next_batch()
        plan.stopping = True
        assert plan.next_batch() is None


class TestSuspects:
    def test_what_was_in_hand_at_three_deaths_comes_last_and_alone(self, job, planner):
        job.prompts("a", "suspect", "b", "c", "other suspect", "d")
        died_with(job, "suspect", SUSPECT_STARTS)
        died_with(job, "other suspect", SUSPECT_STARTS)
        died_with(job, "b", SUSPECT_STARTS - 1)
        found = batches(planner(job.serving(batch_size=4)))
        assert prompts(found) == [["a", "b", "c", "d"], ["suspect"], ["other suspect"]]
        assert [request.alone for batch in found for request in batch] == [False] * 4 + [True] * 2

    def test_suspects_of_one_kind_share_no_batch_key(self, job, planner):
        job.prompts("suspect", "other suspect")
        for prompt in ("suspect", "other suspect"):
            died_with(job, prompt, SUSPECT_STARTS)
        plan = planner()
        (first,), (second,) = batches(plan)
        assert plan.batch_key(first) != plan.batch_key(second)

    def test_a_suspect_waits_until_nothing_else_is_in_hand(self, job, planner):
        job.prompts("a", "suspect")
        died_with(job, "suspect", SUSPECT_STARTS)
        plan = planner()
        (other,) = plan.next_batch()
        assert plan.next_batch() is None
        plan.parent_ended(other, Outcome(request_id=other.request_id, status="failed"))
        assert prompts([plan.next_batch()]) == [["suspect"]]

    def test_the_least_suspect_is_tried_first(self, job, planner):
        job.prompts("worst", "bad", "least")
        for prompt, alone in (("worst", 2), ("bad", 1), ("least", 0)):
            died_with(job, prompt, SUSPECT_STARTS)
            died_with(job, prompt, alone, alone=True)
        assert prompts(batches(planner())) == [["least"], ["bad"], ["worst"]]

    def test_after_three_deaths_alone_it_has_failed(self, job):
        job.prompts("a", "deadly", "b")
        died_with(job, "deadly", SUSPECT_STARTS)
        died_with(job, "deadly", DEADLY_STARTS, alone=True)
        summary = job.run()
        assert (summary.done, summary.reasons) == (2, {"killed_worker": 1})
        assert "died 3 times while making this image alone" in job.table()[1]["images_error"]["message"]
        assert job.made().total() == 2

    def test_a_killed_worker_gets_a_new_chance_when_asked_for(self, job):
        job.prompts("deadly")
        died_with(job, "deadly", DEADLY_STARTS, alone=True)
        job.run()
        assert job.run(retry=frozenset({"killed_worker"})).done == 1

    def test_a_suspect_that_works_alone_is_none_any_more(self, job):
        job.prompts("a", "suspect")
        died_with(job, "suspect", SUSPECT_STARTS)
        assert job.run().done == 2
        assert [record.get("alone", False) for record in job.records("start")][-1] is True
        assert job.index().starts == {}

    def test_a_run_that_tried_often_and_was_killed_counts_as_one_death(self, job):
        """Attempts are not deaths."""
        job.prompts("flaky")
        job.run(job.serving(script={"flaky": ["error", "error"]}))
        assert len(job.records("start")) == 1


class TestOtherRuns:
    @pytest.mark.parametrize("retry", [None, frozenset({"crash"})])
    def test_failures_come_again_refusals_do_not(self, job, planner, retry):
        job.prompts("nude", "broken", "fine").run(job.serving(script={"nude": "refuse", "broken": "crash"}))
        plan = planner(retry=retry)
        assert prompts(batches(plan)) == [["broken"]]
        assert plan.tally.counts == {"refused": 1, "done": 1}

    def test_a_row_of_which_one_image_is_missing_asks_for_that_one(self, job, planner):
        serving = job.serving(images_per_prompt=3)
        job.prompts("a").run(serving)
        (job.folder / job.table()[0]["images"][1]).unlink()
        plan = planner(serving)
        (batch,) = batches(plan)
        assert len(batch) == 1
        assert batch[0].request_id in job.table()[0]["images"][1]
        assert (plan.tally.images, plan.tally.counts.total()) == (2, 0)


class TestAdoption:
    def test_a_file_that_is_another_requests_inside_is_not_taken_over(self, job):
        job.prompts("a", "b").run()
        first, second = (job.folder / row["images"][0] for row in job.table())
        first.write_bytes(second.read_bytes())
        job.journal.path.unlink()
        summary = job.run()
        assert (summary.adopted, summary.made) == (1, 1)
        assert job.check_images() == 2

    def test_a_file_that_cannot_be_asked_is_not_taken_over(self, job, monkeypatch):
        job.prompts("a").run()
        job.journal.path.unlink()

        def refuse(*_):
            raise ImageError("unreadable now", reason="unreadable")

        monkeypatch.setattr(ImageIO, "read_metadata", refuse)
        summary = job.run()
        assert (summary.adopted, summary.made) == (0, 1)


class TestColumns:
    def test_a_column_that_comes_late_is_no_missing_column(self, job):
        job.rows(*({"id": i} for i in range(99)), {"prompt": "a"})
        summary = job.run()
        assert (summary.done, summary.failed) == (1, 99)

    def test_a_column_that_none_of_the_first_rows_has_is_one(self, job):
        job.rows(*({"id": i} for i in range(100)), {"prompt": "a"})
        with pytest.raises(InputError, match="the table has 'id'"):
            job.run()

    def test_bad_rows_do_not_hide_it(self, job):
        job.rows("broken", {"id": 1})
        with pytest.raises(InputError, match="the table has 'id'"):
            job.run()


def test_the_book_gives_back_what_was_planned():
    book = RowBook()
    keys = [bytes([number]) * 16 for number in range(3)]
    error = Ending("failed", "bad_row", "broken")
    book.add(keys[:2])
    book.add_error(error)
    book.add([])
    book.add(keys[2:])
    assert list(book) == [(keys[:2], None), ([], error), ([], None), (keys[2:], None)]
