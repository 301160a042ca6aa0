#!/usr/bin/env bash
# Pretrain HOPE 760M: sbatch [options of sbatch] slurm/hope_760m.sh [key=value ...]       (docs/slurm.md)
# 8 GPUs of 80 GB as configs/hope_760m.toml is; for more: sbatch --nodes=8 slurm/hope_760m.sh engine.micro_batch_size=2 engine.recompute=none
#SBATCH --job-name=hope_760m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this file; the job's record says where the original lies (the last job of an array has the records of all).
[ -e "$here/lib/run.sh" ] || here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q;}')")
# shellcheck source=lib/run.sh
. "$here/lib/run.sh" || exit 2
hope_job configs/hope_760m.toml "$@"
