"""A service that answers like image APIs do, in a process of its own, for tests: no model, real sockets, any fault.

It speaks OpenAI's chat completions, Images, Files and Batches APIs and Gemini's own API. Each picture carries a mark
that says which prompt and inputs it belongs to. What goes wrong is scripted by words in the prompt, and the ledger says
what was billed.
"""

from dataflow.serving.fake_api.client import FakeApi
from dataflow.serving.fake_api.ledger import PRICES
from dataflow.serving.fake_api.pictures import expected_mark, expected_text, read_mark
from dataflow.serving.fake_api.script import FAULTS, STORM_FAULTS, Script, kind_of_fault

__all__ = [
    "FAULTS",
    "PRICES",
    "STORM_FAULTS",
    "FakeApi",
    "Script",
    "expected_mark",
    "expected_text",
    "kind_of_fault",
    "read_mark",
]
