#!/bin/bash
# Stops the pipeline of this pod and waits until its stage has saved a checkpoint: at most SECONDS (default 90).
# The head pod runs it before Kubernetes ends it (preStop). `ray stop` follows, because Ray's shell ignores SIGTERM.
set -uo pipefail
seconds=${1:-90}
cd "${REDIFFUSE_PROJECT:?REDIFFUSE_PROJECT names the project folder: set it in the head pod}" || exit 1
if [ -e runs/pipeline.lock ] && ! flock --nonblock runs/pipeline.lock true; then
  kill -TERM -- "-$(cat runs/pipeline.group)"
  flock --wait "$seconds" runs/pipeline.lock true || echo "the pipeline did not end within $seconds s" >&2
fi
