"""What a row means: every operator turns rows into requests and outcomes back into rows."""

from dataflow.operators.core_text import (
    EditInstructionWriter,
    PromptBalancer,
    PromptDeduplicator,
    PromptRewriter,
    PromptTemplateSampler,
    PromptTranslator,
)
from dataflow.operators.core_vision import (
    DuplicateFilter,
    EditEvaluator,
    ImageEvaluator,
    ObjectEvaluator,
    PairEvaluator,
    PromptedImageEditGenerator,
    QuestionEvaluator,
    ScoreFilter,
    Text2ImageGenerator,
)

__all__ = [
    "DuplicateFilter",
    "EditEvaluator",
    "EditInstructionWriter",
    "ImageEvaluator",
    "ObjectEvaluator",
    "PairEvaluator",
    "PromptBalancer",
    "PromptDeduplicator",
    "PromptRewriter",
    "PromptTemplateSampler",
    "PromptTranslator",
    "PromptedImageEditGenerator",
    "QuestionEvaluator",
    "ScoreFilter",
    "Text2ImageGenerator",
]
