# shellcheck shell=bash
# What the batch script does when its training step has ended: the decision alone, as a function of facts, and the words for them.
#
#   hope_decide RC VERDICT STATE REASON JOB_STATE FRUITLESS  ->  done | leave | preempted | stopped | user | never | requeue | give-up
#
# Three more actions are decided elsewhere (lib/run.sh): exclude and nodes, when preflight has found bad nodes, and vanished.
#
# RC: of srun, which mixes the codes of its tasks: after one task has failed the others are killed, and srun may report theirs.
# VERDICT: the first exit code 2 (a person's mistake) or 93 (do not restart) of any task, left by lib/task.sh; empty: none.
# STATE, REASON: of status.json, which belongs to this attempt because it is removed before; empty: never written.
# JOB_STATE: what Slurm says, PREEMPTED for a running job that must make room, TIMEOUT for one that has met its limit. Anything else but
# RUNNING means that somebody, a person or the scheduler, has decided about this job.
# FRUITLESS: attempts of this job in a row, this one included, that ended at the same committed step (lib/attempts.sh).

hope_decide() {
  local rc=$1 verdict=$2 state=$3 reason=$4 job_state=$5 fruitless=$6
  if [ "$state" = "done" ]; then
    echo "done"
  elif [ "$job_state" = PREEMPTED ]; then
    # A script that ends before the grace time is over has ended the job: Slurm requeues only what it had to kill.
    echo preempted
  elif [ "$job_state" != RUNNING ] && [ "$job_state" != TIMEOUT ]; then
    echo leave
  elif [ "$verdict" = 2 ] || { [ "$rc" = 2 ] && [ -z "$verdict$state" ]; }; then
    # Where a rank cannot see the run's directory it can leave nothing there.
    echo user
  elif [ "$verdict" = 93 ] || [ "$state" = diverged ]; then
    echo never
  elif [ "$state" = stopped ] && [ "$rc" = 0 ] && [[ $reason != usr[12] ]] && [ "$job_state" = RUNNING ]; then
    # SIGTERM and a STOP file are a person's wish. With another code one rank has failed: then srun sends SIGTERM to the others.
    echo stopped
  elif [ "$fruitless" -ge "${HOPE_MAX_FRUITLESS:-3}" ]; then
    echo give-up
  else
    echo requeue
  fi
}

# The sentence that a person finds in the job's log.
hope_say() {
  case $1 in
    done) echo "the run has all its steps" ;;
    leave) echo "the job is ${2:-unknown to Slurm}, not RUNNING: cancelled, or taken over by Slurm; not requeued from here" ;;
    preempted) echo "the job must make room; requeue" ;;
    stopped) echo "the run was asked to stop and has saved; not requeued" ;;
    user) echo "the configuration, the data, the disk or the command is wrong (see above); a restart would not help" ;;
    never) echo "the run must not be restarted (it diverged); a restart would meet the same step again" ;;
    give-up) echo "too many attempts without a newer checkpoint (HOPE_MAX_FRUITLESS = ${HOPE_MAX_FRUITLESS:-3}); not requeued again" ;;
    vanished) echo "$((2 * ${HOPE_MAX_FRUITLESS:-3})) attempts in a row began at this step and left no end: lost nodes, or killed at once; not requeued again" ;;
    exclude) echo "bad nodes, see above; once more without them" ;;
    nodes) echo "bad nodes, see above; a job leaves out nodes by itself at most twice. Submit it again with --exclude" ;;
    requeue) echo "the run is not finished; requeue" ;;
  esac
}

# done, leave and stopped are no failure of this script; 93 tells a chain or a watcher not to start the run again.
hope_exit_code() {
  case $1 in
    done | stopped) echo 0 ;;
    user) echo 2 ;;
    never | give-up | nodes | vanished) echo 93 ;;
    *) echo 1 ;;
  esac
}
