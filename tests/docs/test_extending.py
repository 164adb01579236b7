"""The serving that a page shows keeps what every serving keeps."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.contract.test_serving_contract import (  # noqa: F401 - collected here as well
    requests,
    serving,
    test_a_copy_for_another_process_works_alike,
    test_a_parameter_that_does_not_exist_is_named_by_the_check_or_harms_nobody,
    test_answers_come_in_the_order_of_the_requests_and_as_many,
    test_it_can_be_cleaned_up_without_and_more_than_once,
    test_it_can_be_set_up_again_after_it_was_cleaned_up,
    test_it_is_a_serving_with_whole_numbers_from_one,
    test_it_packs_into_a_few_kilobytes_before_and_after_it_was_asked,
    test_its_fingerprint_and_defaults_are_json_and_stay_the_same,
    test_requests_are_checked_and_keyed_before_any_work,
    test_what_it_tells_cannot_be_changed_from_outside,
)
from tests.docs.blocks import ROOT, blocks

from dataflow.io import ImageIO
from dataflow.types import Serving

MODULES = ("draw_service", "my_parts")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Serving]]:
    for block in blocks(ROOT / "docs" / "extending.md"):
        if block.language == "python" and block.title:
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    service, parts = map(importlib.import_module, MODULES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), service.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda: parts.GradientServing(
        ImageIO(tmp_path / "images"), url=f"http://127.0.0.1:{server.server_address[1]}"
    )
    server.shutdown()
    server.server_close()
    for name in MODULES:
        sys.modules.pop(name, None)
