"""The only table from a name in a pipeline file to ``module:Class``."""

from __future__ import annotations

SERVINGS = {
    "local": "dataflow.serving.local_image_gen_serving:LocalImageGenServing",
    "chat": "dataflow.serving.api_vlm_serving_openai:APIVLMServing_openai",
    "openai_images": "dataflow.serving.openai_image_serving:OpenAIImageServing",
    "gemini": "dataflow.serving.gemini_image_serving:GeminiImageServing",
    "image_probe": "dataflow.serving.image_probe:ImageProbeServing",
    "embedding": "dataflow.serving.embedding:EmbeddingServing",
    "clip": "dataflow.serving.clip:ClipServing",
    "clip_edit": "dataflow.serving.clip:ClipEditServing",
    "aesthetic": "dataflow.serving.clip:AestheticServing",
    "pick_score": "dataflow.serving.clip:PickScoreServing",
    "hps_v2": "dataflow.serving.clip:HPSv2Serving",
    "local_vlm": "dataflow.serving.local_vlm_serving:LocalVLMServing",
    "preservation": "dataflow.serving.preservation:PreservationServing",
    "zero_shot_detection": "dataflow.serving.detection:ZeroShotDetectionServing",
    "ocr": "dataflow.serving.ocr:OcrServing",
    "nsfw": "dataflow.serving.nsfw:NsfwServing",
    "pyiqa": "dataflow.serving.pyiqa_metric:PyiqaServing",
    "judge": "dataflow.serving.judge:JudgeServing",
    "answers": "dataflow.serving.answers:AnswerServing",
    "pair_judge": "dataflow.serving.pair_judge:PairJudge",
    "writer": "dataflow.serving.writer:WriterServing",
    "fake": "dataflow.serving.fake_serving:FakeServing",
}
OPERATORS = {
    "Text2ImageGenerator": "dataflow.operators.core_vision.text2image_generator:Text2ImageGenerator",
    "PromptedImageEditGenerator": (
        "dataflow.operators.core_vision.prompted_image_edit_generator:PromptedImageEditGenerator"
    ),
    "ImageEvaluator": "dataflow.operators.core_vision.image_evaluator:ImageEvaluator",
    "QuestionEvaluator": "dataflow.operators.core_vision.question_evaluator:QuestionEvaluator",
    "EditEvaluator": "dataflow.operators.core_vision.edit_evaluator:EditEvaluator",
    "ObjectEvaluator": "dataflow.operators.core_vision.object_evaluator:ObjectEvaluator",
    "PairEvaluator": "dataflow.operators.core_vision.pair_evaluator:PairEvaluator",
    "ScoreFilter": "dataflow.operators.core_vision.score_filter:ScoreFilter",
    "DuplicateFilter": "dataflow.operators.core_vision.duplicate_filter:DuplicateFilter",
    "PromptTemplateSampler": "dataflow.operators.core_text.prompt_template_sampler:PromptTemplateSampler",
    "PromptRewriter": "dataflow.operators.core_text.prompt_rewriter:PromptRewriter",
    "PromptTranslator": "dataflow.operators.core_text.prompt_translator:PromptTranslator",
    "PromptDeduplicator": "dataflow.operators.core_text.prompt_deduplicator:PromptDeduplicator",
    "PromptBalancer": "dataflow.operators.core_text.prompt_balancer:PromptBalancer",
    "EditInstructionWriter": "dataflow.operators.core_text.edit_instruction_writer:EditInstructionWriter",
}
