#!/usr/bin/env bash
# A real Slurm of several virtual nodes on this one machine, for tests: loopback only, as root, without systemd, cgroups or accounting.
#
#   tools/onebox_slurm/start.sh [--nodes 3] [--cpus 8] [--gpus 4] [--dir DIR] [--port 7317]     prints "export SLURM_CONF=..."
#   tools/onebox_slurm/stop.sh [--dir DIR]
#
# Every node is a slurmd of its own. Unless --shared is given it has its own mount and UTS namespaces: host name n1, n2, ..., an
# empty /dev/shm, and an /etc/hosts in which the nodes find each other. GPUs are copies of /dev/null, so that Slurm sets
# CUDA_VISIBLE_DEVICES as it would for real ones. Everything lies in DIR: keys, sockets, state, logs; the system's own munge and
# Slurm are not touched. Exit codes: 0 up, 77 this machine cannot (it says why), 1 the cluster did not come up.
set -euo pipefail

nodes=3 cpus=8 gpus=4 dir=${TMPDIR:-/tmp}/hope-onebox port=7317 isolate=yes
down_after=10 kill_wait=5 grace=10 cred_expire=5
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --cpus) cpus=$2; shift 2 ;;
    --gpus) gpus=$2; shift 2 ;;
    --dir) dir=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;                # slurmctld; node i listens on port + i
    --down-after) down_after=$2; shift 2 ;;    # seconds of silence after which a node is down
    --kill-wait) kill_wait=$2; shift 2 ;;      # seconds from SIGTERM to SIGKILL
    --grace) grace=$2; shift 2 ;;              # seconds that a preempted job has
    --cred-expire) cred_expire=$2; shift 2 ;;  # a requeued job waits this long; sites have 120, and Slurm takes less than 5 for 120
    --shared) isolate=no; shift ;;
    *) echo "start.sh: unknown option $1; see the head of this file" >&2; exit 2 ;;
  esac
done

cannot() { echo "onebox: $1" >&2; exit 77; }
missing=
for program in munged slurmctld slurmd sbatch srun scontrol; do command -v "$program" > /dev/null || missing+=" $program"; done
[ -z "$missing" ] || cannot "missing:$missing; Debian and Ubuntu: apt-get install --no-install-recommends slurm-wlm munge"
[ "$(id -u)" = 0 ] || cannot "slurmd starts jobs for users, so it must be root; run as root, in a container for example"
[ "$isolate" = no ] || unshare -m -u true 2> /dev/null || cannot "no namespaces here (unshare fails); use --shared, and do not stream data then"
[ "${#dir}" -le 70 ] || cannot "--dir $dir is too long for the path of a socket; choose one of at most 70 characters"

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2> /dev/null; }
alive "$dir/run/slurmctld.pid" && { echo "onebox: already up" >&2; echo "export SLURM_CONF=$dir/etc/slurm.conf"; exit 0; }
began=$(date +%s%N)
mkdir -p "$dir"/{etc,run,log,state,munge,dev}
chmod 755 "$dir" "$dir"/{etc,run,log,state,dev}
chmod 700 "$dir/munge"
host=$(hostname -s)

# --- authentication: a key and a socket of our own
[ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom > "$dir/munge/key")
alive "$dir/run/munged.pid" || munged --force --key-file="$dir/munge/key" --socket="$dir/run/munge.socket" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2

# --- configuration; the port of a job's rank 0 follows from the job's number, which must differ from that of another cluster here
for ((i = 0; i < gpus; i++)); do [ -e "$dir/dev/gpu$i" ] || mknod "$dir/dev/gpu$i" c 1 3; done
all="n[1-$nodes]"
gres=; [ "$gpus" = 0 ] || gres="Gres=gpu:fake:$gpus"
{
  cat << CONF
ClusterName=onebox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$((port % 1000 + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.socket,cred_expire=$cred_expire
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/run/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PriorityType=priority/basic
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=$down_after
KillWait=$kill_wait
MinJobAge=300
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=4096 $gres State=UNKNOWN"
  done
  echo "PartitionName=low Nodes=$all Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace"
  echo "PartitionName=high Nodes=$all MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF"
} > "$dir/etc/slurm.conf"
{ echo AutoDetect=off; [ "$gpus" = 0 ] || echo "NodeName=$all Name=gpu Type=fake File=$dir/dev/gpu[0-$((gpus - 1))]"; } > "$dir/etc/gres.conf"
printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainDevices=no\nConstrainRAMSpace=no\nIgnoreSystemd=yes\n' > "$dir/etc/cgroup.conf"
{ echo "127.0.0.1 localhost $host"; for ((i = 1; i <= nodes; i++)); do echo "127.0.0.1 n$i"; done; } > "$dir/etc/hosts"
export SLURM_CONF=$dir/etc/slurm.conf

# --- daemons; they must not keep the caller's output open
slurmctld -c -f "$SLURM_CONF" > /dev/null 2>&1
for ((i = 1; i <= nodes; i++)); do
  mkdir -p "$dir/run/spool.n$i"
  if [ "$isolate" = yes ]; then
    # shellcheck disable=SC2016
    unshare -m -u bash -c 'mount --make-rprivate / && mount -t tmpfs -o size=256m tmpfs /dev/shm && mount --bind "$1/etc/hosts" /etc/hosts &&
      hostname "$2" && exec slurmd -N "$2" -f "$1/etc/slurm.conf"' onebox "$dir" "n$i" > /dev/null 2>&1
  else
    slurmd -N "n$i" -f "$SLURM_CONF" > /dev/null 2>&1
  fi
done

for _ in $(seq 150); do
  up=$(sinfo -h -p low -t idle -o %D 2> /dev/null | head -1 || true)
  if [ "${up:-0}" = "$nodes" ]; then
    echo "onebox: $nodes nodes up in $((($(date +%s%N) - began) / 1000000)) ms" >&2
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 0.1
done
echo "onebox: only ${up:-0} of $nodes nodes came up; the ends of the logs in $dir/log:" >&2
tail -n 5 "$dir"/log/*.log >&2
exit 1
