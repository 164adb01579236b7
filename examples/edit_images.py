"""Instruction edits: every picture of a table is changed as its instruction says.

    python examples/edit_images.py

Name a real model instead of the built-in one and the rest stays as it is:
    python examples/edit_images.py --model black-forest-labs/FLUX.1-Kontext-dev
"""

import argparse
import os

from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.utils.storage import FileStorage


class EditImages:
    def __init__(self, edits: str, cache_path: str, model: str) -> None:
        self.storage = FileStorage(
            first_entry_file_name=edits,
            cache_path=cache_path,
            file_name_prefix="dataflow_cache_step",
            cache_type="jsonl",
        )
        self.serving = LocalImageGenServing(
            image_io=ImageIO(save_path=os.path.join(self.storage.cache_path, "images")),
            hf_model_name_or_path=model,
            hf_cache_dir="~/.cache/huggingface",
            hf_local_dir="./ckpt/models/",
            Image_gen_task="imageedit",
            batch_size=4,
        )
        self.generator = PromptedImageEditGenerator(pipe=self.serving)

    def forward(self) -> None:
        self.generator.run(
            storage=self.storage.step(),
            input_image_key="images",
            input_conversation_key="conversations",
            output_image_key="edited_images",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default=os.path.join(os.path.dirname(__file__), "edits.jsonl"))
    parser.add_argument("--cache-path", default="./cache_local/edit_images")
    parser.add_argument("--model", default="builtin:tiny-flux")
    options = parser.parse_args()
    EditImages(options.edits, options.cache_path, options.model).forward()
