"""Operators that make, change, score and choose images."""

from dataflow.operators.core_vision.duplicate_filter import DuplicateFilter
from dataflow.operators.core_vision.image_evaluator import ImageEvaluator
from dataflow.operators.core_vision.prompted_image_edit_generator import PromptedImageEditGenerator
from dataflow.operators.core_vision.score_filter import ScoreFilter
from dataflow.operators.core_vision.text2image_generator import Text2ImageGenerator

__all__ = ["DuplicateFilter", "ImageEvaluator", "PromptedImageEditGenerator", "ScoreFilter", "Text2ImageGenerator"]
