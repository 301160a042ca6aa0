# shellcheck shell=bash
# The run's own record of its jobs: which job owns the run, and how every attempt began and ended. Used by lib/run.sh only.
#
#   RUN/slurm/owner      id of the job that may write the run; taken over only when Slurm says that this job is gone
#   RUN/slurm/owner.after-ID   who takes over from ID, for the moment that it takes
#   RUN/slurm/attempts   one line each: `start N job=ID.RESTART step=S` and `end N job=ID.RESTART step=S from=S rc=C action=WORD`
#
# S is the last committed step. HOPE_RUN_DIR and HOPE_JOB are set; HOPE_LINEAGE is what belongs together: one job with its requeues, or one chain.

# Last committed step of the run, 0 before the first. The directory may be a link to another disk.
hope_committed() {
  local last
  last=$(find "$HOPE_RUN_DIR/checkpoints/" -maxdepth 1 -type d -name 'step-[0-9]*' 2> /dev/null | sed 's/.*step-0*//' | sort -n | tail -1)
  echo "${last:-0}"
}

# Makes this job the run's owner; fails, naming the other, if a job that still exists has it. A hard link appears whole or not at all, and
# of several jobs that find the same dead owner only one can have the name that says so.
hope_own() {
  local owner=$HOPE_RUN_DIR/slurm/owner mine=$HOPE_RUN_DIR/slurm/.owner-$HOPE_JOB other said=
  if ! echo "$HOPE_JOB" > "$mine"; then
    echo "hope: cannot write $mine, see above; make room, or set out= to another place" >&2
    return 1
  fi
  # This job exists, so nobody comes after it.
  rm -f "$owner.after-$HOPE_JOB"
  for _ in 1 2 3; do
    said=$(ln "$mine" "$owner" 2>&1) && break
    [ -e "$owner" ] || continue
    other=$(hope_owner)
    if [ "$other" != "$HOPE_JOB" ]; then
      if [ "$other" != none ] && hope_job_exists "$other"; then
        said="run $HOPE_RUN belongs to job $other, which still exists; wait for it, cancel it, or give this run another name"
        break
      fi
      # A machine that lost its power may have left an empty file.
      [ -s "$owner.after-$other" ] || rm -f "$owner.after-$other"
      ln "$mine" "$owner.after-$other" 2> /dev/null || continue
    fi
    # A slow one may have come when all was over: then nothing leads from the owner's file to its name.
    if [ "$(hope_owner)" = "$HOPE_JOB" ]; then
      [ "$(cat "$owner")" = "$HOPE_JOB" ] || mv -f "$mine" "$owner"
      break
    fi
    rm -f "$owner.after-$other"
  done
  rm -f "$mine"
  if [ "$(cat "$owner" 2> /dev/null)" = "$HOPE_JOB" ]; then
    rm -f "$owner.after-"*
    return 0
  fi
  echo "hope: job $HOPE_JOB cannot take $owner: $said" >&2
  return 1
}

# The job that owns the run, or is about to; `none` where the file is empty.
hope_owner() {
  local owner=$HOPE_RUN_DIR/slurm/owner job next
  job=$(cat "$owner" 2> /dev/null)
  job=${job:-none}
  for _ in 1 2 3 4 5 6 7 8; do
    [ "$job" != "$HOPE_JOB" ] || break
    next=$(cat "$owner.after-$job" 2> /dev/null)
    job=${next:-$job}
  done
  echo "$job"
}

# Whether a job is anything but finished. A scheduler that does not answer is no proof of its end.
hope_job_exists() {
  local said
  said=$(squeue --noheader --format=%T --jobs="$1" 2>&1) || { [[ $said != *"Invalid job id"* ]]; return; }
  [ -n "$said" ]
}

hope_disown() {
  [ "$(cat "$HOPE_RUN_DIR/slurm/owner" 2> /dev/null)" != "$HOPE_JOB" ] || rm -f "$HOPE_RUN_DIR/slurm/owner"
}

# hope_record start|end [more ...]: appends a line about HOPE_ATTEMPT.
hope_record() {
  local what=$1 job=$HOPE_LINEAGE.${SLURM_RESTART_COUNT:-0}
  shift
  echo "$what $HOPE_ATTEMPT job=$job step=$(hope_committed) $* time=$(date -u +%Y-%m-%dT%H:%M:%SZ)" >> "$HOPE_RUN_DIR/slurm/attempts"
}

hope_next_attempt() {
  local count
  count=$(grep -c '^start ' "$HOPE_RUN_DIR/slurm/attempts" 2> /dev/null)
  echo $((count + 1))
}

# Attempts of this lineage, counted back from the present one, that began and ended at the committed step of now. Ends that Slurm, a
# person or a bad node decided count for nothing.
hope_fruitless() {
  local now
  now=$(hope_committed)
  if [ "$HOPE_FROM" != "$now" ]; then
    echo 0
    return
  fi
  grep "^end .* job=$HOPE_LINEAGE\\." "$HOPE_RUN_DIR/slurm/attempts" 2> /dev/null | grep -vE ' action=(leave|preempted|exclude) ' |
    awk -v now="$now" '{ count = ($4 == "step=" now && $5 == "from=" now) ? count + 1 : 0 } END { print count + 1 }'
}

# Attempts of this lineage right before the present one, whose start is recorded, that began at its step and left no end: their nodes were
# lost, they were killed before they could say anything, or the job was requeued by somebody.
hope_vanished() {
  grep " job=$HOPE_LINEAGE\\." "$HOPE_RUN_DIR/slurm/attempts" 2> /dev/null |
    awk -v from="step=$HOPE_FROM" '{ count = ($1 == "start" && $4 == from) ? count + 1 : 0 } END { print (count ? count - 1 : 0) }'
}
