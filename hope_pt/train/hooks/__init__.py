"""What happens between steps, one concern a file: metrics, measurements, checkpoints, status, progress.

Order matters: a checkpoint comes after everything that is measured at its step, so that all of it is in metrics.jsonl before.
"""
