"""What happens between steps, one concern a file: metrics, diagnostics, evaluation, checkpoints, progress.

Order matters: a checkpoint is the last of its step, so that everything measured at the step is in metrics.jsonl before it.
"""
