#!/usr/bin/env bash
# Evaluate a run on its held-out data: sbatch slurm/eval.sh RUN [options of hope eval]
#SBATCH --job-name=hope_eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this file; the job's record says where the original lies (the last job of an array has the records of all).
[ -e "$here/lib/run.sh" ] || here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q;}')")
# shellcheck source=lib/run.sh
. "$here/lib/run.sh" || exit 2

hope_service eval "$@"
