"""What each command of ``dataflow`` does: a few lines over the pipeline, its configuration and the engine."""
