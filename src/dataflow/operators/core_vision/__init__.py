"""Operators that make, change, score and choose images."""

from dataflow.operators.core_vision.duplicate_filter import DuplicateFilter
from dataflow.operators.core_vision.edit_evaluator import EditEvaluator
from dataflow.operators.core_vision.image_evaluator import ImageEvaluator
from dataflow.operators.core_vision.object_evaluator import ObjectEvaluator
from dataflow.operators.core_vision.pair_evaluator import PairEvaluator
from dataflow.operators.core_vision.prompted_image_edit_generator import PromptedImageEditGenerator
from dataflow.operators.core_vision.question_evaluator import QuestionEvaluator
from dataflow.operators.core_vision.score_filter import ScoreFilter
from dataflow.operators.core_vision.text2image_generator import Text2ImageGenerator

__all__ = [
    "DuplicateFilter",
    "EditEvaluator",
    "ImageEvaluator",
    "ObjectEvaluator",
    "PairEvaluator",
    "PromptedImageEditGenerator",
    "QuestionEvaluator",
    "ScoreFilter",
    "Text2ImageGenerator",
]
