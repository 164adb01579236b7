"""Operators that make and change images."""

from dataflow.operators.core_vision.prompted_image_edit_generator import PromptedImageEditGenerator
from dataflow.operators.core_vision.text2image_generator import Text2ImageGenerator

__all__ = ["PromptedImageEditGenerator", "Text2ImageGenerator"]
