# shellcheck shell=bash
# The life of one batch job of a training run, from the submitted arguments to the decision about a restart. `hope_job` is the only way in.
#
#   hope_job CONFIG [--config FILE] [key=value ...]
#
# own the run -> forget the last attempt's status -> address -> preflight -> srun lib/task.sh hope train ... -> decide -> requeue or exit.
# Environment: HOPE_RUN (name of the run), HOPE_CLUSTER (slurm/clusters/NAME.env), HOPE_PREFLIGHT=0 skips the checks of the nodes,
# HOPE_REQUEUE=0 never requeues (chains set it). Exit codes: 0 done or asked to stop, 2 a person's mistake, 93 do not restart, 1 else.

HOPE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export HOPE_ROOT
# shellcheck source=env.sh
. "$HOPE_ROOT/slurm/lib/env.sh"
# shellcheck source=attempts.sh
. "$HOPE_ROOT/slurm/lib/attempts.sh"
# shellcheck source=decide.sh
. "$HOPE_ROOT/slurm/lib/decide.sh"

hope_job() {
  set -uo pipefail
  local script=$PWD/$0
  [[ $0 != /* ]] || script=$0
  hope_arguments "$@" || exit 2
  if [ -n "$dry_run" ]; then
    exec "$(hope_program)" launch dry-run "$script" --config "$config" "${overrides[@]}" "name=$HOPE_RUN" "out=$out"
  fi
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "hope: this is no Slurm job; submit it with sbatch, or look at it with --dry-run" >&2
    exit 2
  fi
  # The last job of an array has the id of the whole array: what is said of that id is said of all.
  HOPE_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  export HOPE_JOB=${HOPE_JOB:-$SLURM_JOB_ID}
  export HOPE_LINEAGE=${HOPE_LINEAGE:-$HOPE_JOB}
  mkdir -p "$HOPE_RUN_DIR/slurm" "$HOPE_RUN_DIR/logs" || exit 2
  wanted='' step_pid=''
  trap 'hope_signal USR1' USR1
  trap 'hope_signal USR2' USR2
  trap 'hope_signal TERM' TERM
  hope_own || exit 2
  HOPE_ATTEMPT=$(hope_next_attempt) HOPE_FROM=$(hope_committed)
  export HOPE_ATTEMPT HOPE_FROM
  hope_record start "nodes=${SLURM_JOB_NODELIST:-?} ranks=${SLURM_NTASKS:-?} gpu=${HOPE_GPU:-?}"
  # What the last attempt left must not decide about this one.
  rm -f "$HOPE_RUN_DIR/status.json" "$HOPE_RUN_DIR/slurm/verdict" "$HOPE_RUN_DIR/slurm/bad-node"
  hope_defaults
  [ "$(hope_vanished)" -lt $((2 * ${HOPE_MAX_FRUITLESS:-3})) ] || hope_close vanished 1
  hope_address || hope_finish 1
  echo "hope: run $HOPE_RUN, attempt $HOPE_ATTEMPT from step $HOPE_FROM, job $HOPE_JOB on $SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT"
  hope_preflight
  hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" train "$config" "${overrides[@]}" "name=$HOPE_RUN" "out=$out" || hope_finish 2
  hope_wait "${step[@]}"
  hope_finish "$rc"
}

# Sets config, overrides, out, dry_run and exports HOPE_RUN, HOPE_RUN_DIR. Relative paths are relative to the repository.
hope_arguments() {
  config=$1 overrides=() dry_run='' out=
  local name=${HOPE_RUN:-}
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      --config)
        [ $# -gt 1 ] || { echo "hope: --config needs a FILE" >&2; return 2; }
        config=$2
        shift
        ;;
      -*) echo "hope: argument '$1': options of sbatch stand before the script: sbatch $1 ... (for a dry run: hope launch dry-run)" >&2; return 2 ;;
      name=*) name=${1#name=} ;;
      out=*) out=${1#out=} ;;
      *=*) overrides+=("$1") ;;
      *) echo "hope: argument '$1': expected key=value, --config FILE or --dry-run" >&2; return 2 ;;
    esac
    shift
  done
  [ -z "${HOPE_CLUSTER:-}" ] || hope_cluster "$HOPE_CLUSTER" || return 2
  cd "$HOPE_ROOT" || return 2
  [ -r "$config" ] || { echo "hope: $config: no such configuration file below $HOPE_ROOT" >&2; return 2; }
  name=${name:-$(hope_top_key name)} out=${out:-${HOPE_OUT:-$(hope_top_key out)}}
  HOPE_RUN=${name:-$(basename "$config" .toml)}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID} out=${out:-runs}
  [[ $HOPE_RUN =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || { echo "hope: HOPE_RUN = '$HOPE_RUN': letters, digits, . _ - only" >&2; return 2; }
  [[ $out = /* ]] || out=$HOPE_ROOT/$out
  HOPE_RUN_DIR=$out/$HOPE_RUN
  export HOPE_RUN HOPE_RUN_DIR
}

# A string of the configuration file that stands before its first table.
hope_top_key() {
  sed -n "/^\[/q; s/^$1 *= *\"\([^\"]*\)\".*/\1/p" "$config"
}

# USR1 (at some sites USR2) comes some time before the limit, to this shell only; TERM with a requeue or a cancellation. All go on to every rank.
hope_signal() {
  wanted=$1
  [ -z "$step_pid" ] || kill -s "$1" "$step_pid" 2> /dev/null
}

# hope_wait COMMAND...: runs it and sets rc to its own exit code, whatever signals arrive meanwhile.
hope_wait() {
  if [ -n "$wanted" ]; then
    rc=1
    return
  fi
  local before left
  "$@" &
  step_pid=$!
  while :; do
    before=$wanted wanted=
    wait "$step_pid"
    rc=$?
    # A trapped signal interrupts wait; the step goes on.
    [ -n "$wanted" ] || break
    if [ "$wanted" = TERM ] && [ "$(hope_job_state)" = TIMEOUT ]; then
      # Slurm kills this shell KillWait seconds after the limit, and a killed shell cannot requeue the job.
      left=$(hope_scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
      for ((left = ${left:-30} / 3; left > 0; left--)); do
        kill -0 "$step_pid" 2> /dev/null || break
        sleep 1
      done
      rc=143
      break
    fi
  done
  wanted=$before step_pid=''
}

# Looks at the nodes before the trainer joins them (hope_pt/launch/preflight.py writes the names of bad ones). A job with a bad node is
# requeued without it, at most twice; of a chain the next links leave it out.
hope_preflight() {
  [ "${HOPE_PREFLIGHT:-1}" != 0 ] || return 0
  local bad exclusions
  hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" launch preflight "$HOPE_RUN_DIR" || hope_finish 2
  hope_wait "${step[@]}"
  bad=$(sort -u "$HOPE_RUN_DIR/slurm/bad-node" 2> /dev/null | paste -sd,)
  [ "$rc" != 0 ] || return 0
  if [ -z "$bad" ] || [ "$(hope_job_state)" != RUNNING ]; then
    hope_finish "$rc"
  fi
  exclusions=$(grep -c "^end .* job=$HOPE_LINEAGE\\..* action=exclude " "$HOPE_RUN_DIR/slurm/attempts")
  if [ -n "${HOPE_CHAIN:-}" ] || { [ "$exclusions" -lt 2 ] && [ "${HOPE_REQUEUE:-1}" != 0 ]; }; then
    hope_close exclude "$rc" "$bad"
  else
    hope_close nodes "$rc" "$bad"
  fi
}

# Requeues this job, without the nodes $1 if given; returns only if Slurm refuses, and then says why. Slurm ends this shell meanwhile, but
# not before KillWait seconds after a SIGTERM. A cancelled job stays cancelled, also if that happened a moment ago.
hope_requeue() {
  local which=incomplete
  # At its time limit a job is not what Slurm calls incomplete any more.
  [ "$(hope_job_state)" != TIMEOUT ] || which=
  # shellcheck disable=SC2086
  if ! hope_scontrol requeue $which "$HOPE_JOB" > /dev/null; then
    # An answer may have been lost after Slurm had done it.
    [[ $(hope_job_state) = @(PENDING|REQUEUED|CONFIGURING) ]] || return 1
  fi
  [ -z "${1:-}" ] || hope_leave_out "$1" "$HOPE_JOB"
  sleep 120
  exit 1
}

# hope_leave_out NODES JOB...: these jobs will not start on these nodes. Those of a job cannot be changed before it is requeued.
hope_leave_out() {
  local bad=$1 job excluded
  shift
  for job; do
    excluded=$(hope_scontrol show job "$job" | sed -n 's/.* ExcNodeList=//p')
    [ "$excluded" != "(null)" ] || excluded=
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      scontrol update "JobId=$job" "ExcNodeList=$excluded${excluded:+,}$bad" 2> /dev/null && continue 2
      sleep 0.3
    done
    echo "hope: job $job may start on $bad again: scontrol cannot change its nodes" >&2
  done
}

# scontrol with patience: while the controller is away (a restart, a fail-over), for HOPE_CONTROLLER_S seconds; and again if the signal that
# ends a job has met scontrol too.
hope_scontrol() {
  local said code end=$((SECONDS + ${HOPE_CONTROLLER_S:-600}))
  while :; do
    said=$(scontrol "$@" 2>&1)
    code=$?
    case $code,$said in
      0,*) echo "$said"; return 0 ;;
      1[2-5]?,* | *"nable to contact"* | *"onnection refused"* | *"timed out"* | *"Zero Bytes"*) ;;
      *) break ;;
    esac
    [ "$SECONDS" -lt "$end" ] || break
    sleep 0.3
  done
  echo "hope: scontrol $*: $said" >&2
  return 1
}

# Also PREEMPTED for a job that runs and must make room, TIMEOUT for one that Slurm ends at its limit; empty if Slurm does not know the job.
hope_job_state() {
  local said state
  said=$(hope_scontrol show job "$HOPE_JOB")
  state=$(sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p' <<< "$said")
  if [ "$state" = RUNNING ] && grep -q ' PreemptTime=[0-9]' <<< "$said"; then
    state=PREEMPTED
  elif [ "$state" = COMPLETING ] && grep -q ' Reason=TimeLimit ' <<< "$said"; then
    state=TIMEOUT
  fi
  echo "$state"
}

# One string value of status.json, which may be missing.
hope_status() {
  sed -n "s/^ *\"$1\": *\"\([^\"]*\)\".*/\1/p" "$HOPE_RUN_DIR/status.json" 2> /dev/null | head -1
}

# hope_finish RC: decides, and closes the attempt.
hope_finish() {
  local verdict
  verdict=$(readlink "$HOPE_RUN_DIR/slurm/verdict")
  job_state=$(hope_job_state)
  hope_close "$(hope_decide "$1" "$verdict" "$(hope_status state)" "$(hope_status reason)" "$job_state" "$(hope_fruitless)")" "$1"
}

# hope_close ACTION RC [BAD NODES]: records and says what was decided, does it, and ends this script.
hope_close() {
  local action=$1 rc=$2 bad=${3:-}
  hope_record end "from=$HOPE_FROM" "rc=$rc action=$action${bad:+ bad=$bad}"
  echo "hope: attempt $HOPE_ATTEMPT ended with code $rc at committed step $(hope_committed): $(hope_say "$action" "${job_state:-}")${bad:+: $bad}"
  case $action in
    requeue | preempted | exclude)
      if [ "${HOPE_REQUEUE:-1}" != 0 ]; then
        hope_requeue "$bad"
        echo "hope: this job could not be requeued, see above; where jobs may not requeue themselves use slurm/chain.sh" >&2
      elif [ -z "${HOPE_CHAIN:-}" ]; then
        echo "hope: not requeued from here (HOPE_REQUEUE=0): submit it again, or use slurm/chain.sh"
      elif [ -n "$bad" ]; then
        # shellcheck disable=SC2046
        hope_leave_out "$bad" $(squeue --noheader --format=%i --state=PENDING --name="$HOPE_CHAIN" --user="$(id -un)")
      fi
      ;;
    leave) ;;
    *)
      if [ -n "${HOPE_CHAIN:-}" ]; then
        echo "hope: the links of chain $HOPE_CHAIN that still wait are cancelled"
        scancel --state=PENDING --name="$HOPE_CHAIN" --user="$(id -un)"
      fi
      ;;
  esac
  hope_disown
  exit "$(hope_exit_code "$action")"
}

# hope_service COMMAND...: `hope COMMAND...` in every task of this job, for jobs that need no restart.
hope_service() {
  set -uo pipefail
  [ -z "${HOPE_CLUSTER:-}" ] || hope_cluster "$HOPE_CLUSTER" || exit 2
  cd "$HOPE_ROOT" || exit 2
  HOPE_RUN_DIR=
  hope_defaults
  hope_address || exit 1
  hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" "$@" || exit 2
  exec "${step[@]}"
}
