#!/usr/bin/env bash
# Many small runs as one job array, for example for scaling laws: every line of FILE holds the key=value arguments of one run.
#   sbatch --array=0-$(($(grep -c . FILE) - 1))%4 slurm/sweep.sh CONFIG FILE [key=value for all ...]
# Line I (from 0, empty lines not counted) becomes the run NAME-I, with its own directory, restarts and decision. A relative FILE is one of
# the folder that it is submitted from. `hope launch sweep` runs all combinations of some values, without preflight and the count of attempts.
#SBATCH --job-name=hope_sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this file; the job's record says where the original lies (the last job of an array has the records of all).
[ -e "$here/lib/run.sh" ] || here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q;}')")
# shellcheck source=lib/run.sh
. "$here/lib/run.sh" || exit 2

if [ $# -lt 2 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "hope: usage: sbatch --array=0-N slurm/sweep.sh CONFIG FILE [key=value ...]" >&2
  exit 2
fi
config=$1 file=$2
shift 2
line=$(grep . "$file" | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
[ -n "$line" ] || { echo "hope: $file has no line $SLURM_ARRAY_TASK_ID (counted from 0)" >&2; exit 2; }
read -ra settings <<< "$line"
hope_job "$config" "$@" "${settings[@]}"
