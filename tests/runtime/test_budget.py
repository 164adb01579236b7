"""Money: what was paid is counted once, whatever came of it, and the limit is never passed."""

import asyncio
from dataclasses import replace

import pytest

from dataflow.errors import BadOutputError, RunStoppedError, ServingError
from dataflow.runtime.budget import Budget, dollars_of
from dataflow.runtime.progress import describe
from dataflow.serving.fake_serving import FakeServing


class Paid(FakeServing):
    """A service that bills every call, also those without a result, and counts its own bill."""

    def __init__(self, *args, price=0.1, dearest=None, known=True, **options):
        super().__init__(*args, **options)
        self.price, self.known, self.expected = price, known, dearest
        self.bill = 0.0

    def estimate(self, request):
        return self.expected

    async def generate(self, requests):
        self.bill += self.price * len(requests)
        usage = {"tokens": 7, "usd": self.price if self.known else None}
        try:
            results = await super().generate(requests)
        except ServingError as error:
            error.usage = usage
            raise
        for result in results:
            if result.error:
                result.error.usage = usage
        return [replace(result, usage=usage) for result in results]


def paid(job, **options):
    return Paid(job.io, **{"size": (8, 8), "log": job.log, **options})


def test_every_call_is_counted(job):
    serving = paid(job, script={"nude": "refuse", "lost": ["error", "error"], "half": "garbage"})
    summary = job.prompts("fine", "nude", "lost", "half").run(serving)
    assert (summary.done, summary.refused, summary.failed) == (2, 1, 1)
    assert summary.usd == pytest.approx(serving.bill) == pytest.approx(0.6)
    assert "$0.6000 spent, $0.3000 per image" in describe(summary)


def test_runs_add_up(job):
    first = paid(job, script={"half": "garbage"})
    job.prompts("one", "half").run(first)
    second = paid(job)
    summary = job.prompts("one", "half", "more").run(second)
    assert summary.usd == pytest.approx(first.bill + second.bill) == pytest.approx(0.4)
    assert job.run(paid(job)).usd == pytest.approx(0.4)
    assert job.index().usd == pytest.approx(0.4)


def test_an_unknown_price_is_said(job):
    summary = job.prompts("one", "two").run(paid(job, known=False))
    assert (summary.usd, summary.unpriced) == (0.0, 2)
    assert "2 calls at an unknown price" in describe(summary)


@pytest.mark.parametrize("expected", [None, 0.1, 0.05])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_budget_is_never_passed_and_can_be_raised(job, expected, concurrency):
    job.prompts(*(f"prompt {number}" for number in range(20)))
    options = {"concurrency": concurrency, "seconds": 0.01, "dearest": expected}
    serving = paid(job, **options)
    with pytest.raises(RunStoppedError, match=r"budget of \$1.05 does not hold another call") as caught:
        job.run(serving, budget_usd=1.05)
    # An estimate that is too low is made good for by the first call's real price: those beside it may pass it.
    slack = 0 if expected != 0.05 else 0.05 * concurrency
    assert serving.bill <= 1.05 + slack
    assert caught.value.summary.done == pytest.approx(10, abs=1 if expected == 0.05 else 0)
    job.run(paid(job, **options), budget_usd=2.0)
    assert job.check_images() == 20
    assert job.index().usd == pytest.approx(2.0)


def test_no_budget_without_a_price(job):
    job.prompts("one", "two", "three")
    with pytest.raises(RunStoppedError, match="nobody knows what these calls cost") as caught:
        job.run(paid(job, known=False, dearest=None), budget_usd=5.0)
    assert caught.value.summary.made == 1


def test_a_serving_that_costs_nothing_needs_no_budget(job):
    assert job.prompts("one", "two").run(budget_usd=0.01).done == 2


@pytest.mark.parametrize(("reproducible", "made"), [(True, 0), (False, 1)])
def test_a_broken_answer_is_asked_for_again_where_the_next_may_be_whole(job, reproducible, made):
    serving = paid(job, script={"half": ["garbage", "garbage"]})
    serving.reproducible = reproducible
    summary = job.prompts("half").run(serving)
    assert (summary.made, summary.usd) == (made, pytest.approx(0.3 if made else 0.1))


def test_an_attempt_that_cost_money_survives_in_the_journal(job):
    class Broken(Paid):
        async def generate(self, requests):
            raise BadOutputError("nothing", usage={"usd": 0.25})

    job.prompts("one").run(Broken(job.io))
    records = [record for record in job.journal.records() if record]
    assert [record["usage"]["usd"] for record in records if record["s"] == "paid"] == [0.25]
    assert job.index().usd == 0.25


@pytest.mark.parametrize(
    ("usage", "expected"),
    [({}, 0.0), ({"usd": 0.5}, 0.5), ({"usd": 0}, 0.0), ({"tokens": 3}, None)]
    + [({"usd": value}, None) for value in (None, True, "1", -1, float("nan"), float("inf"))],
)
def test_what_a_call_cost(usage, expected):
    assert dollars_of(usage) == expected


def test_one_goes_alone_while_nobody_knows_the_price():
    async def story():
        spent = [0.0]
        budget = Budget(1.0, lambda: sum(spent))
        first = await budget.hold([None])
        second = asyncio.create_task(budget.hold([None]))
        await asyncio.sleep(0.01)
        assert (first, second.done()) == (1.0, False)
        spent.append(0.4)
        await budget.settle(first, 0.4, 1)
        assert await second == pytest.approx(0.4)
        third = asyncio.create_task(budget.hold([0.1]))
        await asyncio.sleep(0.01)
        assert not third.done()  # 0.2 are left, and one has cost 0.4 before
        spent.append(0.1)
        await budget.settle(0.4, 0.1, 1)
        assert await third == pytest.approx(0.4)
        spent.append(0.4)
        await budget.settle(0.4, 0.4, 1)
        assert await budget.hold([None]) is None

    asyncio.run(story())
