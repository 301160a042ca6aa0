#!/usr/bin/env bash
# Look at nodes without training on them: sbatch --nodes=16 slurm/preflight.sh [DIRECTORY of the runs]
# Devices, disk, ports, a matrix product and an all-reduce on every node; slow and bad ones are named, and the exit code is not 0 (docs/slurm.md).
#SBATCH --job-name=hope_preflight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.log

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this file; the job's record says where the original lies (the last job of an array has the records of all).
[ -e "$here/lib/run.sh" ] || here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q;}')")
# shellcheck source=lib/run.sh
. "$here/lib/run.sh" || exit 2

hope_service launch preflight "${1:-runs}"
