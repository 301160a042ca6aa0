"""Trials of the real trainer on a real Slurm of virtual nodes; `python -m tools.slurm_trials --help`."""
