"""The page in a real browser, opened from disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.made_runs import CHINESE, make_run, rows_of, summary_of

from dataflow.calibration import Options, calibrate_choices
from dataflow.ratings import read_choices, read_scores
from dataflow.report import ReportOptions, write_report

Open = Callable[..., Any]
SHOWN = (
    """at => location.hash.endsWith(`=${at}`) && document.querySelector('dialog .prompt')?.innerText.includes('star')"""
)


@pytest.fixture(scope="module")
def report(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([finished], tmp_path_factory.mktemp("reports") / "one").page.parent


@pytest.fixture(scope="module")
def two(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    other = make_run(folder / "other", model="painter-3", count=8)
    return write_report([finished, other], folder / "report").page.parent


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a report; at the end nothing may have gone wrong on the page, and nothing asked of the network."""
    contexts, wrong, asked = [], [], []

    def open_page(report: Path, place: str = "", expected: str = "\0", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def said(message: Any) -> None:
            if message.type in ("error", "warning") and expected not in message.text:
                wrong.append(message.text)

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((report / "index.html").as_uri() + place)
        page.wait_for_selector("main > *")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert all(url.startswith(("file:///", "data:", "blob:")) for url in asked)


def until(page: Any, condition: str, arg: Any = None, seconds: float = 10.0) -> None:
    """Wait until JavaScript says so. Not the browser's own waiting, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition, arg):
        assert time.monotonic() < end, f"waited in vain for {condition} ({arg})"
        time.sleep(0.02)


def wait_for_count(page: Any, count: int) -> None:
    until(page, "count => document.querySelector('.chips b')?.textContent === count", arg=f"{count:,}")


def all_details(report: Path) -> list[dict[str, Any]]:
    paths = sorted((report / "data" / "details").glob("*.js"), key=lambda path: int(path.stem))
    texts = [path.read_text(encoding="ascii") for path in paths]
    return [each for text in texts for each in json.loads(text[text.index(",") + 1 : -3])]


def value_of(entry: dict[str, Any]) -> float | None:
    """The judge's score of an entry."""
    return entry["scores"][0][1]["value"] if entry["scores"] and entry["scores"][0][1] else None


def test_the_first_screen_answers_how_many_why_and_how_much(opened, report):
    page = opened(report)
    run = summary_of(report)["runs"][0]
    figures = page.inner_text(".figures")
    assert f"{run['kept']} of {run['rows']}" in figures
    assert "$" in figures
    rows = page.inner_text(".funnel")
    assert f"{run['rows']} rows =" in rows
    assert "refused" in rows
    page.wait_for_selector(".samples img")
    assert page.evaluate("document.querySelector('.samples').getBoundingClientRect().top < innerHeight")
    page.wait_for_selector(".chart canvas")
    assert "at least 0.3" in page.get_attribute(".chart .plot", "aria-label")
    page.click(".chart summary")
    assert page.locator(".chart table tbody tr").first.is_visible()


def test_a_loss_leads_to_its_entries(opened, report):
    page = opened(report)
    link = page.locator(".loss", has_text="refused").first
    count = int(link.inner_text().split()[0].lstrip("−"))
    link.click()
    wait_for_count(page, count)
    assert page.locator(".tile.refused").count() == count
    page.locator(".tile.refused").first.click()
    page.wait_for_selector("dialog .prompt")
    assert "declines" in page.inner_text("dialog")


def test_sorting_by_a_score(opened, report):
    page = opened(report, "#gallery")
    scores = [
        each["scores"][0][1]["value"] if each["scores"] and each["scores"][0][1] else None
        for each in all_details(report)
    ]
    best = max((value, -at) for at, value in enumerate(scores) if value is not None)
    page.select_option(".bar select", "score:judge.value")
    page.click("text=low first")
    until(page, "at => document.querySelector('.grid .tile').dataset.at === at", arg=str(-best[1]))
    shown = [int(tile.get_attribute("data-at")) for tile in page.locator(".grid .tile").all()]
    values = [scores[at] for at in shown]
    assert values == sorted(values, key=lambda value: -value)
    page.click("text=high first")
    least = min((value, at) for at, value in enumerate(scores) if value is not None)
    until(page, "at => document.querySelector('.grid .tile').dataset.at === at", arg=str(least[1]))


def test_filtering_by_numbers_text_and_categories(opened, report):
    page = opened(report, "#gallery")
    details = all_details(report)
    wait_for_count(page, len(details))
    page.select_option("aside select", "score:judge.value")
    page.fill("aside fieldset:has-text('judge.value') label:has-text('from') input", "0.5")
    page.keyboard.press("Tab")
    high = [each for each in details if (value_of(each) or 0) >= 0.5]
    wait_for_count(page, len(high))
    # Not check(), which looks at the box before a slow machine has drawn it again.
    page.click("aside fieldset:has-text('state') >> text=not chosen")
    left = [each for each in high if each["state"] == "not_chosen"]
    wait_for_count(page, len(left))
    page.click(".chip:has-text('judge.value')")
    wait_for_count(page, sum(each["state"] == "not_chosen" for each in details))
    page.click(".chip:has-text('state')")
    page.fill(".search", "狐狸")
    wait_for_count(page, sum(CHINESE in each["prompt"] for each in details))
    own = next(Path(each["path"]).stem for each in details if each["path"])
    page.fill(".search", own[:12])
    wait_for_count(page, 1)
    page.fill(".search", "no such words anywhere")
    wait_for_count(page, 0)
    assert "No entry" in page.inner_text("main")


def test_a_range_of_a_chart_leads_to_its_pictures(opened, report):
    page = opened(report)
    page.wait_for_selector(".chart canvas")
    area = page.locator(".chart .u-over").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 60, steps=4)
    page.mouse.up()
    page.wait_for_selector(".gallery .chip")
    low, high = (float(field.input_value()) for field in page.locator("aside .range input").all())
    assert 0.4 < low < 0.6 < 0.7 < high < 0.9
    wait_for_count(page, sum(low <= (value_of(each) or 0) <= high for each in all_details(report)))


def test_best_first_from_a_chart(opened, report):
    page = opened(report)
    page.locator(".chart a", has_text="best first").first.click()
    best = max((value, -at) for at, each in enumerate(all_details(report)) if (value := value_of(each)) is not None)
    until(page, "at => document.querySelector('.grid .tile')?.dataset.at === at", arg=str(-best[1]))


def test_prompts_in_groups(opened, report):
    page = opened(report, "#gallery?by=prompt&q=number+3")
    page.wait_for_selector(".group img")
    assert page.inner_text(".group h3").startswith("a red fox number 3 in the snow")
    expected = sum("number 3 in" in each["prompt"] for each in all_details(report))
    assert page.locator(".group .tile").count() == expected


def test_everything_about_an_edit_on_a_click(opened, report, finished):
    row = next(row for row in rows_of(finished / "dataflow_cache_step_step4.jsonl") if row["edited_images"])
    details = all_details(report)
    at = next(at for at, each in enumerate(details) if each["path"] == row["edited_images"][0])
    page = opened(report, f"#gallery?entry={at}")
    page.wait_for_selector("img-comparison-slider.rendered")
    text = page.inner_text("dialog")
    entry = details[at]
    for expected in (
        row["prompt"],
        "remove the background",
        entry["file"]["seed"],
        "painter-2",
        entry["command"],
        "$0.04",
    ):
        assert expected in text
    page.wait_for_selector(".lineage li >> nth=4")
    assert page.locator(".lineage li").count() == 5  # three pictures drawn, two turns of edits
    until(page, "[...document.querySelectorAll('img-comparison-slider img')].every((each) => each.naturalWidth)")
    images = page.locator("img-comparison-slider img")
    sources = [images.nth(number).evaluate("image => [image.src, image.naturalWidth]") for number in (0, 1)]
    assert [source.rpartition("/")[2] for source, _ in sources] == [
        Path(row["edited_images_turns"][0][0]).name,
        Path(row["edited_images_turns"][0][1]).name,
    ]
    assert all(width == 64 for _, width in sources)
    assert page.evaluate("new URL(document.querySelector('dialog a.button').href).pathname").endswith(
        Path(row["edited_images"][0]).name
    )
    page.select_option(".slider select", "1")
    until(
        page,
        "name => document.querySelector('img-comparison-slider img').src.endsWith(name)",
        arg=Path(row["images"][0]).name,
    )


def test_the_slider_moves_with_keys(opened, report):
    details = all_details(report)
    at = next(at for at, each in enumerate(details) if each["turn"] == 2)
    page = opened(report, f"#gallery?entry={at}")
    page.wait_for_selector("img-comparison-slider.rendered")
    before = page.evaluate("document.querySelector('img-comparison-slider').value")
    page.focus("img-comparison-slider")
    page.keyboard.down("ArrowRight")
    until(page, "before => document.querySelector('img-comparison-slider').value > before", arg=before)
    page.keyboard.up("ArrowRight")
    assert f"entry={at}" in page.url  # the arrow did not go to the next entry


def test_everything_works_with_keys(opened, report):
    page = opened(report, "#gallery")
    page.wait_for_selector(".grid .tile img")
    page.focus(".grid .tile")
    across = page.evaluate("document.querySelector('.grid .line').children.length")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.closest('[data-place]')?.dataset.place"
    until(page, f"{focused} === '{across + 1}'")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    at = page.evaluate("document.activeElement.dataset.at")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] .prompt")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):  # faster than the page is drawn
        page.keyboard.press(key)
    until(page, "at => location.hash.endsWith('entry=' + at)", arg=str(int(at) + 1))
    page.keyboard.press("ArrowLeft")
    until(page, "before => location.hash.endsWith('entry=' + before)", arg=at)
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    until(page, "at => document.activeElement.dataset.at === at", arg=at)
    page.keyboard.press("End")
    last = summary_of(report)["count"] - 1
    until(page, f"{focused} === '{last}'")
    assert page.evaluate("document.activeElement.getBoundingClientRect().bottom <= innerHeight + 1")


def test_controls_have_names(opened, two):
    for place in ("", "#gallery", "#gallery?entry=0", "#problems", "#compare", "#compare?by=blind"):
        page = opened(two, place)
        page.wait_for_timeout(200)
        nameless = page.evaluate(
            """[...document.querySelectorAll('button, a[href], input, select')].filter((each) => {
                const said = each.getAttribute('aria-label') || each.querySelector('img')?.alt;
                const label = said || each.innerText || each.placeholder || each.title;
                return !(label && label.trim()) && !each.labels?.length;
            }).map((each) => each.outerHTML)"""
        )
        assert nameless == []


def test_problems_are_told_by_reason(opened, report):
    page = opened(report, "#problems")
    text = page.inner_text("main")
    for words in ("the fake service declines", "Unterminated string", "is an HTML page", "the judge said nothing"):
        assert words in text


def test_hostile_prompts_are_text(opened, two, report):
    for place in ("", "#problems", "#gallery?q=star&by=prompt", "#compare"):
        page = opened(two, place)
        page.wait_for_timeout(300)
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[onerror], img[src='x']").count() == 0
    hostile = [at for at, each in enumerate(all_details(report)) if each["cells"].get("topic") == "hostile"]
    page = opened(report, f"#gallery?entry={hostile[0]}")
    seen = set()
    for at in hostile:
        page.evaluate("at => { location.hash = `gallery?entry=${at}`; }", at)
        until(page, SHOWN, arg=at)
        seen.add(page.inner_text("dialog .prompt"))
    page.wait_for_timeout(100)
    assert any("</script><script>window.hacked=1" in text for text in seen)
    assert any('<img src=x onerror="window.hacked=1">' in text for text in seen)
    scripts = page.evaluate("[...document.scripts].filter((script) => !script.src).length")
    assert scripts == 0
    assert page.evaluate("window.hacked") is None


def test_a_hostile_title(opened, finished, tmp_path):
    title = "</title><script>window.hacked=1</script>"
    page = opened(write_report([finished], tmp_path / "report", ReportOptions(title=title)).page.parent)
    assert page.title() == title
    assert page.inner_text("h1") == title
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(opened, report, scheme):
    page = opened(report, "", color_scheme=scheme)
    contrast = """() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const light = (colour) => {
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
                part /= 255; return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const style = getComputedStyle(document.documentElement);
        const of = (name) => light(style.getPropertyValue(name).trim());
        const names = ['--ink', '--faint', '--accent', '--kept', '--refused', '--failed', '--dropped', '--waiting'];
        const worst = names.flatMap((name) =>
            ['--card', '--paper'].map((ground) => {
                const [a, b] = [of(name), of(ground)].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), name, ground];
            }));
        return worst.sort((x, y) => x[0] - y[0])[0];
    }"""
    worst = page.evaluate(contrast)
    assert worst[0] >= 4.5, worst
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(20, 21, 24)") == (scheme == "dark")
    page.click(".theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != ground


@pytest.mark.parametrize("place", ["", "#gallery", "#problems", "#gallery?entry=2", "#compare", "#compare?by=blind"])
def test_nothing_is_cut_off_on_a_narrow_screen(opened, two, place):
    page = opened(two, place, viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('dialog') ? document.querySelector('dialog').scrollWidth : 0") <= 360


def test_runs_side_by_side(opened, two):
    page = opened(two, "#compare")
    page.wait_for_selector(".beside img")
    first = page.locator(".group").first
    assert first.locator(".beside > div").count() == 2
    assert first.locator(".beside > div").nth(1).inner_text().strip().startswith("other")


def test_blind_choices_are_read_by_calibrate(opened, two, tmp_path):
    page = opened(two, "#compare?by=blind", accept_downloads=True)
    page.wait_for_selector(".sides-blind img >> nth=1")
    shown = page.inner_text("main")
    assert "painter" not in shown
    page.fill("input[placeholder=optional]", "Li 李")
    page.locator("h2.prompt").click()
    keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "s", "ArrowLeft", "ArrowRight"]
    for key in keys:  # faster than the page is drawn
        page.keyboard.press(key)
    until(page, "number => document.querySelector('progress')?.value === number", arg=len(keys))
    page.keyboard.press("Backspace")
    until(page, "document.querySelector('progress')?.value === 5")
    page.reload()  # what was chosen stays
    until(page, "document.querySelector('progress')?.value === 5")
    with page.expect_download() as download:
        page.click("text=Download 4 choices")
    file = tmp_path / "choices.jsonl"
    shutil.copyfile(download.value.path(), file)
    lines = rows_of(file)
    assert [line["choice"] for line in lines] == ["first", "second", "tie", "first"]
    assert {line["rater"] for line in lines} == {"Li 李"}
    assert all(
        {line["first_run"], line["second_run"]} == {run["name"] for run in summary_of(two)["runs"]} for line in lines
    )
    choices = read_choices(file, "first", "second", "choice", "rater")
    assert (len(choices.items), choices.unreadable) == (4, 0)
    items = [item for pair in choices.items for item in pair]
    scores, _ = read_scores(two / "scored.jsonl", items, ["judge.value"], key="images")
    assert set(scores) == set(items)
    found = calibrate_choices(choices, scores, ["judge.value"], Options(resamples=20))
    assert (found.rated, found.unmatched) == (4, 0)


def test_one_run_can_be_rated_too(opened, report):
    page = opened(report, "#compare")
    page.wait_for_selector(".sides-blind img >> nth=1")
    page.click("text=left is better")
    until(page, "document.querySelector('progress')?.value === 1")


def test_a_data_file_that_is_gone_is_told(opened, finished, tmp_path):
    target = write_report([finished], tmp_path / "report").page.parent
    shutil.rmtree(target / "data" / "details")
    page = opened(target, "#gallery?entry=0", expected="ERR_FILE_NOT_FOUND")
    page.wait_for_selector("dialog .warning")
    assert "missing from the report" in page.inner_text("dialog")
