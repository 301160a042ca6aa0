# shellcheck shell=bash
# The job's environment: the cluster's file, the address of rank 0, defaults of NCCL and torch, and the srun line with its container.
# HOPE_ROOT is set. Functions print or export; nothing is started here. `hope launch` renders its lines with these same functions.

# Reads slurm/clusters/$1.env (or a path): lines KEY=value, taken literally; what the environment already has wins.
hope_cluster() {
  local name=$1 file line key
  file=$HOPE_ROOT/slurm/clusters/$name.env
  [[ $name != */* ]] || file=$name
  if [ ! -r "$file" ]; then
    echo "hope: HOPE_CLUSTER = '$name': there is no $file; copy slurm/clusters/example.env and fill it in" >&2
    return 2
  fi
  while IFS= read -r line || [ -n "$line" ]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    key=${line%%=*}
    if [[ ! $line =~ ^[A-Z][A-Z0-9_]*= ]]; then
      echo "hope: $file: '$line': expected KEY=value" >&2
      return 2
    fi
    [ -n "${!key+set}" ] || export "$key=${line#*=}"
  done < "$file"
}

# Rank 0's host and a port that follows from the job, so that two jobs on one node differ and a restart never meets its own old socket.
# There is no fallback: a wrong guess is a silent hang.
hope_address() {
  local hosts
  if ! hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || [ -z "$hosts" ]; then
    echo "hope: 'scontrol show hostnames $SLURM_JOB_NODELIST' failed on $(hostname), so there is no address for rank 0" >&2
    return 1
  fi
  export MASTER_ADDR=${hosts%%$'\n'*} HOPE_HOSTS=${hosts//$'\n'/,}
  export MASTER_PORT=$((16384 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0} % 16) % 16384))
}

# Defaults that a cluster file or the caller may override.
hope_defaults() {
  # Since Slurm 22.05 srun does not take the cores of a task from its job: without this every rank may be bound to one.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
  export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1} PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # Several ranks and reader processes share a node: without this, tensor parallelism does not overlap its messages on older GPUs.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # A collective that fails ends the process, and leaves a record of the last ones of every rank.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-${HOPE_RUN_DIR:+$HOPE_RUN_DIR/logs/}nccl-rank-}
  # Compiled kernels are cached on the node: hundreds of ranks would race on a shared disk.
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/hope-triton-$(id -u)}
}

# The command of the trainer: the environment beside the code, or the cluster's.
hope_program() {
  if [ -n "${HOPE_COMMAND:-}" ]; then
    echo "$HOPE_COMMAND"
  elif [ -x "$HOPE_ROOT/.venv/bin/hope" ] && [ "${HOPE_CONTAINER:-none}" = none ]; then
    echo "$HOPE_ROOT/.venv/bin/hope"
  else
    echo hope
  fi
}

# hope_step COMMAND...: fills the array `step` with the srun line that starts COMMAND once for each task, in the cluster's container.
# Numbers of nodes and tasks are the job's own: srun inherits them. A container sees the repository, the folder of the run and HOPE_MOUNTS.
hope_step() {
  step=(srun --kill-on-bad-exit=1 --label --unbuffered)
  [ -z "${HOPE_SRUN_OPTIONS:-}" ] || { local -a more; read -ra more <<< "$HOPE_SRUN_OPTIONS"; step+=("${more[@]}"); }
  # The later one of two mounts covers the other where one is a folder of the other.
  local mounts=${HOPE_MOUNTS:+$HOPE_MOUNTS,}$HOPE_ROOT:$HOPE_ROOT runs=${HOPE_RUN_DIR:+$(dirname "$HOPE_RUN_DIR")}
  [[ -z $runs || $runs/ = $HOPE_ROOT/* ]] || mounts+=,$runs:$runs
  if [ "${HOPE_CONTAINER:-none}" != none ] && [ -z "${HOPE_IMAGE:-}" ]; then
    echo "hope: HOPE_CONTAINER = '$HOPE_CONTAINER' without HOPE_IMAGE; name the image in the cluster's file" >&2
    return 2
  fi
  case ${HOPE_CONTAINER:-none} in
    none) step+=("$@") ;;
    pyxis)
      # srun hands no option of the batch job on to the plug-in, so the step has them all.
      step+=(--container-image="$HOPE_IMAGE" --container-mounts="$mounts" --container-workdir="$HOPE_ROOT" --no-container-entrypoint "$@")
      ;;
    apptainer)
      step+=(apptainer exec --bind "$mounts" --pwd "$HOPE_ROOT")
      [ "${HOPE_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}" = 0 ] || step+=(--nv)
      step+=("$HOPE_IMAGE" "$@")
      ;;
    *)
      echo "hope: HOPE_CONTAINER = '$HOPE_CONTAINER': expected none, pyxis or apptainer" >&2
      return 2
      ;;
  esac
}
