# shellcheck shell=bash
# Ray over a Slurm allocation: one raylet per node. Sourced by the scripts of this folder in the batch shell, which runs on the first node.
#
#   start_ray              starts the head and the workers and waits until all nodes have joined
#   run_on_ray COMMAND...  runs a command on that Ray and exits with its status; on SIGTERM it stops the command, which
#                          saves its state, and puts the job back into the queue
#
# Environment:  REDIFFUSE_JOIN_SECONDS  time limit for all nodes to join (300)
#               REDIFFUSE_GRACE_SECONDS time that the command has to save its state after SIGTERM (90; less than --signal gives)
#               REDIFFUSE_HEAD_IP       address of the first node that the others reach (its first address)
#               REDIFFUSE_RAY_TMP       node-local folder for Ray's files; its path must be short (/tmp/rediffuse-JOB; each node adds its number)

say() { printf '%s rediffuse: %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

project=${project:?set the project folder first}
if [ -d "$project/.venv/bin" ]; then
  PATH=$project/.venv/bin:$PATH
fi
for program in dvc ray python3; do
  command -v "$program" >/dev/null || fail "$program is not on the PATH: install the project in $project first (README), .venv/bin/$program"
done

JOB_DIR=$project/runs/slurm/$SLURM_JOB_ID # on the storage that all nodes share
RAY_TMP=${REDIFFUSE_RAY_TMP:-/tmp/rediffuse-$SLURM_JOB_ID}
GRACE_SECONDS=${REDIFFUSE_GRACE_SECONDS:-90}
ray_step=""   # the process of srun that holds all raylets
work=""       # the command; also the number of its session
asked_to_stop="" # why, if so

# Start Ray on all nodes and set RAY_ADDRESS.
start_ray() {
  mkdir -p "$JOB_DIR"
  rm -f "$JOB_DIR/signalled" "$JOB_DIR"/ray-*.log # of an earlier start
  unset RAY_AUTH_TOKEN # it would win over the file
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$JOB_DIR/token
  rm -f "$RAY_AUTH_TOKEN_PATH"
  (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
  export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 JOB_DIR RAY_TMP
  local ip
  ip=${REDIFFUSE_HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}
  # Two free ports: the head's, and that of Ray's client server, which is fixed otherwise.
  read -r HEAD_PORT CLIENT_PORT < <(python3 -c '
import socket
sockets = [socket.create_server(("", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))')
  export HEAD_IP=$ip HEAD_PORT CLIENT_PORT
  trap 'asked_to_stop="SIGTERM"' TERM
  trap 'stop_ray' EXIT
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): Ray on $SLURM_JOB_NUM_NODES node(s), $SLURM_JOB_NODELIST, head $HEAD_IP:$HEAD_PORT"
  # setsid: a signal to the batch shell's process group must not end the raylets before the command has saved its state.
  setsid srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --overlap --cpu-bind=none --no-kill --kill-on-bad-exit=0 --wait=0 \
    --output="$JOB_DIR/ray-%t.log" bash "$project/infra/slurm/raylet.sh" &
  ray_step=$!
  export RAY_ADDRESS=$HEAD_IP:$HEAD_PORT
  local waiter limit=${REDIFFUSE_JOIN_SECONDS:-300}
  python3 "$project/infra/slurm/wait_for_nodes.py" "$RAY_ADDRESS" "$SLURM_JOB_NUM_NODES" "$limit" "$JOB_DIR" &
  waiter=$!
  while kill -0 "$waiter" 2>/dev/null; do
    if [ -n "$asked_to_stop" ]; then
      kill "$waiter" 2>/dev/null || true
      end_asked
    fi
    if ! kill -0 "$ray_step" 2>/dev/null; then
      kill "$waiter" 2>/dev/null || true
      fail "Ray ended before all nodes had joined: $(last_words)"
    fi
    nap
  done
  wait "$waiter" || exit 3
}

# Run a command in a session of its own, wait, and exit with its status.
run_on_ray() {
  setsid "$@" &
  work=$!
  while kill -0 "$work" 2>/dev/null; do
    if [ -z "$asked_to_stop" ] && [ -e "$JOB_DIR/signalled" ]; then
      asked_to_stop="a signal to the job's steps"
    fi
    if [ -n "$asked_to_stop" ]; then
      end_asked
    fi
    if ! kill -0 "$ray_step" 2>/dev/null; then
      stop_work "$GRACE_SECONDS"
      fail "Ray ended during the run: $(last_words)"
    fi
    nap
  done
  local status=0
  wait "$work" || status=$?
  stop_ray
  say "done: exit status $status"
  exit "$status"
}

# Stop the command, then Ray, and put the job back into the queue unless it was cancelled.
end_asked() {
  # RUNNING: the time limit or a preemption is near. Otherwise Slurm is ending the job itself, and requeues it if it is preempted;
  # its KillWait leaves 30 seconds for all of this.
  local state grace=$GRACE_SECONDS
  state=$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
  [ "$state" = RUNNING ] || grace=15
  say "$asked_to_stop, job $SLURM_JOB_ID is ${state:-gone}: stopping within $grace s, so that the next start resumes"
  stop_work "$grace"
  stop_ray
  if [ "$state" = RUNNING ]; then
    if scontrol requeue "$SLURM_JOB_ID"; then
      say "requeued: the next start of job $SLURM_JOB_ID resumes"
    else
      say "not requeued: submit the same command again, and it resumes"
    fi
  else
    say "left to Slurm: a preempted job is requeued, a cancelled one is not"
  fi
  exit 143
}

# Stop the command within this many seconds: SIGTERM to every process of the command's session, because DVC does not forward it; SIGKILL after the grace time.
stop_work() {
  [ -n "$work" ] || return 0
  pkill -TERM -s "$work" || true
  local deadline=$((SECONDS + $1))
  while pgrep -s "$work" >/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      say "still running after $1 s, killed: $(pgrep -l -s "$work" | tr '\n' ' ')"
      pkill -KILL -s "$work" || true
      break
    fi
    nap
  done
  work=""
}

# End the raylets, which remove their folders. Runs at every exit.
stop_ray() {
  trap - EXIT
  if [ -n "$work" ]; then
    pkill -KILL -s "$work" || true
  fi
  touch "$JOB_DIR/stop"
  if [ -n "$ray_step" ]; then
    local deadline=$((SECONDS + 20))
    while kill -0 "$ray_step" 2>/dev/null; do
      if [ "$SECONDS" -ge "$deadline" ]; then
        kill -KILL "$ray_step" 2>/dev/null || true
        break
      fi
      nap
    done
    ray_step=""
  fi
  rm -f "$JOB_DIR/token" "$JOB_DIR/stop" "$JOB_DIR/signalled"
}

# The last line of each raylet's log.
last_words() {
  tail -q -n 1 "$JOB_DIR"/ray-*.log 2>/dev/null | tr '\n' ' '
  echo "(logs: $JOB_DIR)"
}

# Sleep in a way that a signal interrupts.
nap() {
  sleep 1 &
  wait $! || true
}
