#!/usr/bin/env bash
# Ends the cluster that start.sh began in DIR: its jobs, then exactly the daemons whose process ids it wrote there.
#
#   tools/onebox_slurm/stop.sh [--dir DIR] [--remove]     --remove: DIR goes too
set -uo pipefail

dir=${TMPDIR:-/tmp}/hope-onebox remove=no
while [ $# -gt 0 ]; do
  case $1 in
    --dir) dir=$2; shift 2 ;;
    --remove) remove=yes; shift ;;
    *) echo "stop.sh: unknown option $1; see the head of this file" >&2; exit 2 ;;
  esac
done
[ -d "$dir/run" ] || { echo "onebox: nothing in $dir" >&2; exit 0; }
export SLURM_CONF=$dir/etc/slurm.conf

# Jobs are killed while the daemons still run: a step outlives its slurmd. Completing ones are waited for.
timeout 5 scancel --full --signal=KILL --user="$(id -un)" --state=RUNNING 2> /dev/null
timeout 5 scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 50); do
  [ -n "$(timeout 5 squeue -h -t running,completing,suspended 2> /dev/null)" ] || break
  sleep 0.1
done

end() {
  local pid
  [ -s "$1" ] && pid=$(cat "$1") || return 0
  kill "$pid" 2> /dev/null
  for _ in $(seq 50); do
    kill -0 "$pid" 2> /dev/null || break
    sleep 0.1
  done
  kill -9 "$pid" 2> /dev/null
  rm -f "$1"
}
end "$dir/run/slurmctld.pid"
for file in "$dir"/run/slurmd.*.pid; do end "$file"; done
end "$dir/run/munged.pid"
[ "$remove" = no ] || rm -rf "$dir"
