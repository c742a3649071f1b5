#!/usr/bin/env bash
# Starts a real SLURM of one node on this machine, for tests: munged, slurmctld and slurmd of Debian's slurm-wlm and munge, as root.
#     scripts/slurm_one_node.sh start FOLDER [PID]   configuration, state and logs go into FOLDER; prints what to export
#     scripts/slurm_one_node.sh stop FOLDER          ends its jobs and the three daemons that start began
# With PID they also end when that process does, however it ends. Several may run at a time, on ports of their own.
set -euo pipefail

action="${1:?start or stop}"
owner="${3:-}"
folder="$(mkdir -p "${2:?a folder for its files}" && cd "$2" && pwd)"

watch() {
    while kill -0 "$owner" 2>/dev/null; do sleep 2; done
    stop
}

stop() {
    export SLURM_CONF="$folder/slurm.conf"
    if [ -s "$folder/slurmctld.pid" ] && timeout 10 scancel --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 20); do
            [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for daemon in slurmctld slurmd munged; do
        if [ -s "$folder/$daemon.pid" ]; then
            kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
            rm -f "$folder/$daemon.pid"
        fi
    done
}

require() {
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || { echo "no $program here: apt-get install slurm-wlm munge" >&2; exit 3; }
    done
    [ "$(id -u)" = 0 ] || { echo "slurmd needs root" >&2; exit 3; }
}

free_port() {
    local port
    while true; do
        port=$((RANDOM % 20000 + 20000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

configuration() {
    cat <<CONF
ClusterName=onenode
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldParameters=enable_configless
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
CONF
}

start() {
    require
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    configuration >"$folder/slurm.conf"
    [ -s "$folder/munge.key" ] || dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
    chmod 400 "$folder/munge.key"
    munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -f "$folder/slurm.conf"
    slurmd -f "$folder/slurm.conf"
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            if [ -n "$owner" ]; then  # in a session of its own, which outlives what ends the owner
                setsid "$0" watch "$folder" "$owner" >/dev/null 2>&1 </dev/null &
            fi
            return
        fi
        sleep 0.5
    done
    echo "SLURM did not come up; see the logs in $folder" >&2
    for written in "$folder"/*.log; do tail -n 5 "$written" >&2; done
    stop
    exit 1
}

"$action"
