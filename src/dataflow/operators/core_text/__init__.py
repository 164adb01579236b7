"""Operators on prompts: making, rewriting, translating and choosing them. A class's suffix says its kind."""

from dataflow.operators.core_text.edit_instruction_writer import EditInstructionWriter
from dataflow.operators.core_text.prompt_balancer import PromptBalancer
from dataflow.operators.core_text.prompt_deduplicator import PromptDeduplicator
from dataflow.operators.core_text.prompt_rewriter import PromptRewriter
from dataflow.operators.core_text.prompt_template_sampler import PromptTemplateSampler
from dataflow.operators.core_text.prompt_translator import PromptTranslator

__all__ = [
    "EditInstructionWriter",
    "PromptBalancer",
    "PromptDeduplicator",
    "PromptRewriter",
    "PromptTemplateSampler",
    "PromptTranslator",
]
