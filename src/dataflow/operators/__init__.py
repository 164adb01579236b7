"""What a row means: every operator turns rows into requests and outcomes back into rows."""

from dataflow.operators.core_vision import PromptedImageEditGenerator, Text2ImageGenerator

__all__ = ["PromptedImageEditGenerator", "Text2ImageGenerator"]
