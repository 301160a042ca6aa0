#!/usr/bin/env bash
# A run as a chain of N jobs, for clusters whose jobs may not requeue themselves; run it on the login node:
#   slurm/chain.sh N [options of sbatch] slurm/hope_1p3b.sh [key=value ...]
# One link runs at a time (--dependency=singleton); each continues where the one before it stopped. When the run is done, or must not be
# restarted, the link that finds out cancels those that wait. To cancel the run: scancel --name=CHAIN (printed).
set -euo pipefail

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || { echo "hope: usage: slurm/chain.sh N [options of sbatch] SCRIPT [key=value ...]" >&2; exit 2; }
links=$1
shift
name=${HOPE_RUN:-run}
for word; do [[ $word != name=* ]] || name=${word#name=}; done
HOPE_CHAIN=hope-chain-$name-$(date +%Y%m%d-%H%M%S)-$$
export HOPE_CHAIN HOPE_LINEAGE=$HOPE_CHAIN HOPE_REQUEUE=0
for ((i = 1; i <= links; i++)); do
  sbatch --parsable --job-name="$HOPE_CHAIN" --dependency=singleton --no-requeue --export=ALL "$@"
done
echo "hope: chain $HOPE_CHAIN of $links links"
