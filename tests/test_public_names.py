"""Names that users' scripts import, and how little importing them costs."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "pandas", "pyarrow", "tqdm", "diffusers", "transformers")


def test_the_public_names_stay():
    from dataflow.io import ImageIO
    from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
    from dataflow.operators.core_vision import PromptedImageEditGenerator as Editor
    from dataflow.operators.core_vision import Text2ImageGenerator as Drawer
    from dataflow.serving.local_image_gen_serving import LocalImageGenServing
    from dataflow.utils.storage import FileStorage

    assert (Editor, Drawer) == (PromptedImageEditGenerator, Text2ImageGenerator)
    assert all(map(callable, (ImageIO, FileStorage, LocalImageGenServing)))


def test_importing_them_loads_nothing_heavy():
    names = "dataflow.operators, dataflow.io, dataflow.utils.storage, dataflow.serving.local_image_gen_serving"
    code = f"import sys, {names}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
