#!/usr/bin/env bash
# One rank: which GPU it has, then the trainer, then a note of the exit codes that srun would lose. Started by srun, one for each GPU.
#
#   task.sh COMMAND...        inside the container where there is one; needs nothing of Slurm but its variables
set -uo pipefail

# The first one stays: what other ranks say afterwards are its consequences. A link needs no room on a disk that is full.
verdict() { [ -z "${HOPE_RUN_DIR:-}" ] || ln -s "$1" "$HOPE_RUN_DIR/slurm/verdict" 2> /dev/null; }

if [ -n "${HOPE_RUN_DIR:-}" ] && [ ! -d "$HOPE_RUN_DIR/slurm" ]; then
  echo "hope: rank $SLURM_PROCID on $(hostname) does not see $HOPE_RUN_DIR; put it on a disk of all nodes, and into HOPE_MOUNTS for a container" >&2
  exit 2
fi

# All GPUs of a node are visible to its ranks (--gres), and each takes the one of its local rank; or each sees one (--gpus-per-task).
seen=${CUDA_VISIBLE_DEVICES-}
IFS=, read -ra devices <<< "$seen"
here=${SLURM_STEP_TASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-1}}
here=${here%%[(,]*}
if [ "${HOPE_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}" != 0 ]; then
  if [ "${#devices[@]}" = 1 ] && [ "$here" -gt 1 ]; then
    export SLURM_LOCALID=0
  elif [ "${#devices[@]}" -lt "$here" ]; then
    echo "hope: rank $SLURM_PROCID on $(hostname) sees GPUs '$seen' for $here ranks; ask for one GPU a task, for example --gres=gpu:$here" >&2
    verdict 2
    exit 2
  fi
fi
echo "hope: rank $SLURM_PROCID of $SLURM_NTASKS: $(hostname), local rank $SLURM_LOCALID, GPU ${devices[$SLURM_LOCALID]-none} of '$seen', $(nproc) cores"

# The trainer handles signals; this shell only has to outlive them, so that the exit code below is the trainer's. Slurm signals every
# process of a step, but a container or another process tracking may reach only this one.
# shellcheck disable=SC2317
forward() { signalled=yes; kill -s "$1" "$child" 2> /dev/null; }
trap 'forward USR1' USR1
trap 'forward USR2' USR2
trap 'forward TERM' TERM
"$@" &
child=$!
while :; do
  signalled=
  wait "$child"
  rc=$?
  [ -n "$signalled" ] || break
done

# 2: a person's mistake, 93: do not restart.
case $rc in
  2 | 93) verdict "$rc" ;;
esac
exit "$rc"
