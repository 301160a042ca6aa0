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
  hope_address || hope_finish 1
  echo "hope: run $HOPE_RUN, attempt $HOPE_ATTEMPT from step $HOPE_FROM, job $HOPE_JOB on $SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT"
  hope_preflight
  hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" train "$config" "${overrides[@]}" "name=$HOPE_RUN" "out=$out" || hope_finish 2
  hope_wait "${step[@]}"
  hope_finish "$rc"
}

# Sets config, overrides, out, dry_run and exports HOPE_RUN, HOPE_RUN_DIR. Relative paths are relative to the repository.
hope_arguments() {
  config=$1 overrides=() dry_run='' out=${HOPE_OUT:-}
  local name=${HOPE_RUN:-}
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      --config) config=${2-}; shift ;;
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
  name=${name:-$(hope_top_key name)} out=${out:-$(hope_top_key out)}
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
  local before
  "$@" &
  step_pid=$!
  while :; do
    before=$wanted wanted=
    wait "$step_pid"
    rc=$?
    # A trapped signal interrupts wait; the step goes on.
    [ -n "$wanted" ] || break
  done
  wanted=$before step_pid=''
}

# Looks at the nodes before the trainer joins them (hope_pt/launch/preflight.py writes the names of bad ones). A job with a bad node is
# requeued without it, at most twice.
hope_preflight() {
  [ "${HOPE_PREFLIGHT:-1}" != 0 ] || return 0
  local bad exclusions
  hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" launch preflight "$HOPE_RUN_DIR" || hope_finish 2
  hope_wait "${step[@]}"
  bad=$(sort -u "$HOPE_RUN_DIR/slurm/bad-node" 2> /dev/null | paste -sd,)
  [ "$rc" != 0 ] || return 0
  [ -n "$bad" ] || hope_finish "$rc"
  exclusions=$(grep -c "^end .* job=$HOPE_LINEAGE\\..* action=exclude " "$HOPE_RUN_DIR/slurm/attempts")
  if [ "$exclusions" -ge 2 ] || [ "${HOPE_REQUEUE:-1}" = 0 ] || [ "$(hope_job_state)" != RUNNING ]; then
    echo "hope: bad nodes $bad, see above; this job leaves out nodes at most twice. Submit it again with --exclude=$bad"
    echo 93 > "$HOPE_RUN_DIR/slurm/verdict"
    hope_finish "$rc"
  fi
  hope_record end "from=$HOPE_FROM" "rc=$rc action=exclude bad=$bad"
  echo "hope: requeued without $bad"
  hope_requeue "$bad"
  hope_finish "$rc"
}

# Requeues this job, without the nodes $1 if given; returns only if Slurm refuses. Slurm ends this shell meanwhile, but not before
# KillWait seconds after a SIGTERM, and the nodes of a job cannot be changed before it is requeued.
hope_requeue() {
  local excluded more
  excluded=$(scontrol show job "$HOPE_JOB" | sed -n 's/.* ExcNodeList=//p')
  [ "$excluded" != "(null)" ] || excluded=
  scontrol requeue "$HOPE_JOB" || return 1
  if [ -n "${1:-}" ]; then
    more=$excluded${excluded:+,}$1
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      scontrol update "JobId=$HOPE_JOB" "ExcNodeList=$more" 2> /dev/null && break
      sleep 0.3
    done
  fi
  sleep 120
  exit 1
}

hope_job_state() {
  local said state
  said=$(scontrol show job "$HOPE_JOB" 2> /dev/null)
  state=$(sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p' <<< "$said")
  if [ "$state" = RUNNING ] && grep -q ' PreemptTime=[0-9]' <<< "$said"; then
    state=PREEMPTED
  fi
  echo "$state"
}

# One string value of status.json, which may be missing.
hope_status() {
  sed -n "s/^ *\"$1\": *\"\([^\"]*\)\".*/\1/p" "$HOPE_RUN_DIR/status.json" 2> /dev/null | head -1
}

# hope_finish RC: decides, records, and ends this script.
hope_finish() {
  local rc=$1 verdict job_state action
  verdict=$(cat "$HOPE_RUN_DIR/slurm/verdict" 2> /dev/null)
  job_state=$(hope_job_state)
  action=$(hope_decide "$rc" "$verdict" "$(hope_status state)" "$(hope_status reason)" "$job_state" "$(hope_fruitless)")
  hope_record end "from=$HOPE_FROM" "rc=$rc action=$action"
  echo "hope: attempt $HOPE_ATTEMPT ended with code $rc at committed step $(hope_committed): $(hope_say "$action" "$job_state")"
  if [ "$action" = requeue ] && [ "${HOPE_REQUEUE:-1}" != 0 ]; then
    hope_requeue
    echo "hope: this cluster does not let jobs requeue themselves; use slurm/chain.sh" >&2
  fi
  hope_disown
  if [ -n "${HOPE_CHAIN:-}" ] && [ "$action" != requeue ] && [ "$action" != leave ]; then
    echo "hope: the links of chain $HOPE_CHAIN that still wait are cancelled"
    scancel --state=PENDING --name="$HOPE_CHAIN" --user="$(id -un)"
  fi
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
