#!/usr/bin/env bash
# The raylet of one node, started by srun (allocation.sh). It ends when the batch shell writes $JOB_DIR/stop.
set -euo pipefail
RAY_TMP=$RAY_TMP-$SLURM_PROCID # several nodes may be one machine

# The command has ended or has saved its state, so nothing is left to drain.
ended() {
  trap '' TERM
  trap - EXIT
  pkill -KILL -u "$(id -u)" -f -- "$RAY_TMP([/ ]|\$)" || true # the processes of this raylet name the folder; its workers follow
  rm -rf "$RAY_TMP"
}
trap ended EXIT
# Slurm signals all steps before a preemption. Tell the batch shell, which stops the command first.
trap 'touch "$JOB_DIR/signalled"' TERM

rm -rf "$RAY_TMP" # of an earlier start of this job
if ! mkdir -m 700 "$RAY_TMP"; then
  echo "error: $RAY_TMP on $(hostname) cannot be made: set REDIFFUSE_RAY_TMP to a short path that is free on every node"
  exit 1
fi

options=(--block --disable-usage-stats --temp-dir="$RAY_TMP" --labels="slurm-node=$SLURMD_NODENAME"
  --num-cpus="${SLURM_CPUS_ON_NODE:-${SLURM_CPUS_PER_TASK:-$(nproc)}}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
  --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)
# The job's memory and not the machine's: Ray would take 30% of all of it for its object store. Slurm counts in MiB.
memory=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * ${SLURM_CPUS_ON_NODE:-1}))}
if [ "$memory" -gt 0 ]; then
  store=$((memory / 4 < 32768 ? memory / 4 : 32768))
  options+=(--object-store-memory=$((store * 1024 * 1024)))
fi
if [ "$SLURM_PROCID" = 0 ]; then
  options+=(--head --node-ip-address="$HEAD_IP" --port="$HEAD_PORT" --ray-client-server-port="$CLIENT_PORT" --include-dashboard=false)
else
  options+=(--address="$HEAD_IP:$HEAD_PORT")
  until (exec 3<>"/dev/tcp/$HEAD_IP/$HEAD_PORT") 2>/dev/null; do
    [ ! -e "$JOB_DIR/stop" ] || exit 0
    sleep 1
  done
fi

ray start "${options[@]}" &
ray=$!
while kill -0 "$ray" 2>/dev/null; do
  if [ -e "$JOB_DIR/stop" ]; then
    exit 0
  fi
  sleep 1 &
  wait $! || true
done
wait "$ray"
