#!/bin/bash
# Runs `dvc repro` in the project's folder; arguments are passed on to it. Works as the entry point of a RayJob, with
# `ray job submit`, and in a shell of the head pod. It ends with 143 if SIGTERM stopped it; start it again to resume.
set -euo pipefail
: "${REDIFFUSE_PROJECT:?REDIFFUSE_PROJECT names the project folder: set it in the head pod}"
cd "$REDIFFUSE_PROJECT"

mkdir -p runs
exec 9>>runs/pipeline.lock
if ! flock --nonblock 9; then
  echo "another pipeline is running in $REDIFFUSE_PROJECT: wait for it, or stop it with stop_pipeline.sh" >&2
  exit 1
fi
group=$(cut -d' ' -f5 "/proc/$$/stat") # fields of the shell: pid (bash) S parent group
echo "$group" >runs/pipeline.group

# A pod that died leaves its process ids in this file, and the ids of another pod may be the same.
rm -f .dvc/tmp/rwlock
if ! git rev-parse --git-dir >/dev/null 2>&1; then
  dvc config --local core.no_scm true
fi

# SIGTERM goes to every process of the group (stop_pipeline.sh, `ray job stop`), so this shell only remembers it. A second
# SIGTERM would end a stage before its checkpoint is written.
stopped=
trap 'stopped=yes' TERM
dvc repro "$@" 9>&- &
status=0
wait $! || status=$?

# DVC dies at once and leaves the stage behind, which is still saving.
others() {
  local path fields
  for path in /proc/[0-9]*/stat; do
    { read -r fields <"$path"; } 2>/dev/null || continue
    path=${path#/proc/}
    [ "${path%/stat}" != $$ ] || continue
    fields=${fields##*) } # the name before it may contain spaces
    # shellcheck disable=SC2086 # split it into words
    set -- $fields
    [ "$1" = Z ] || [ "$3" != "$group" ] || return 0
  done
  return 1
}
if [ -n "$stopped" ]; then
  while others; do sleep 0.2; done
  echo "stopped by SIGTERM: start the job again to resume" >&2
  exit 143
fi
exit "$status"
