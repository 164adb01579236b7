"""Every test here has a workshop; no library may reach for the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.export.making import Workshop

os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any test file imports datasets
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)
