"""Text to image: every prompt of a table becomes a picture.

    python examples/text_to_image.py

Name a real model instead of the built-in one and the rest stays as it is:
    python examples/text_to_image.py --model black-forest-labs/FLUX.1-dev
"""

import argparse
import os

from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.utils.storage import FileStorage


class TextToImage:
    def __init__(self, prompts: str, cache_path: str, model: str) -> None:
        self.storage = FileStorage(
            first_entry_file_name=prompts,
            cache_path=cache_path,
            file_name_prefix="dataflow_cache_step",
            cache_type="jsonl",
        )
        self.serving = LocalImageGenServing(
            image_io=ImageIO(save_path=os.path.join(self.storage.cache_path, "images")),
            batch_size=4,
            hf_model_name_or_path=model,
            hf_cache_dir="~/.cache/huggingface",
            hf_local_dir="./ckpt/models/",
        )
        self.generator = Text2ImageGenerator(pipe=self.serving)

    def forward(self) -> None:
        self.generator.run(
            storage=self.storage.step(),
            input_conversation_key="conversations",
            output_image_key="images",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=os.path.join(os.path.dirname(__file__), "prompts.jsonl"))
    parser.add_argument("--cache-path", default="./cache_local/text_to_image")
    parser.add_argument("--model", default="builtin:tiny-flux")
    options = parser.parse_args()
    TextToImage(options.prompts, options.cache_path, options.model).forward()
