#!/usr/bin/env bash
# Runs steps one after the other on this machine, with the interface of slurm.sh.
set -euo pipefail

LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=_common.sh
source "$LAUNCH_DIR/_common.sh"

count_gpus() {
  if command -v nvidia-smi > /dev/null; then
    nvidia-smi --list-gpus 2> /dev/null | wc -l
  else
    echo 0
  fi
}

check_local_step() {
  check_step
  ((NODES == 1)) || die "--nodes $NODES: local.sh runs on one machine; use slurm.sh"
  [[ -z $CONTAINER ]] || die "--container: local.sh runs in the present environment; use slurm.sh"
}

run_command() {
  local status seen
  show "${COMMAND[@]}"
  ((DRY_RUN)) && return
  exit_if_stopped
  "${COMMAND[@]}" &
  CHILD=$!
  [[ -z $STOP_SIGNAL ]] || hand_on "$STOP_SIGNAL" # it came while the child was being started
  # A signal to this script is handed on by the trap and also ends the wait: wait again. A child that has
  # ended by then, however quickly, still gives its own status.
  while true; do
    seen=$SIGNALS status=0
    wait "$CHILD" || status=$?
    ((SIGNALS == seen)) && break
  done
  CHILD=''
  if ((status == REQUEUE_STATUS)); then
    echo "stopped by a signal after saving; the same command resumes from there" >&2
  fi
  ((status == 0)) || exit "$status"
}

# A signal between two steps, or during a step without remaining work, stops the chain.
exit_if_stopped() {
  [[ -n $STOP_SIGNAL ]] || return 0
  echo "stopped by a signal between two steps; the same command resumes from there" >&2
  exit "$REQUEUE_STATUS"
}

run_step() {
  GPUS=${GPUS:-$(count_gpus)}
  with_procs run_lines
}

run_lines() {
  local index step=("${STEP[@]}")
  if [[ -z $ARRAY_FILE ]]; then
    build_command --standalone
    run_command
    return
  fi
  read_array_lines
  for ((index = 0; index < ${#ARRAY_LINES[@]}; index++)); do
    STEP=("${step[@]}")
    append_array_line "$index"
    build_command --standalone
    run_command
  done
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  set_default_options
  print_usage local.sh 'Runs the steps on this machine, one after the other; a step that fails ends it.'
  exit 0
fi
CHILD='' STOP_SIGNAL='' SIGNALS=0
hand_on() {
  STOP_SIGNAL=$1 SIGNALS=$((SIGNALS + 1))
  [[ -z $CHILD ]] || kill -s "$1" "$CHILD" 2> /dev/null || true
}
# A background process of a script ignores SIGINT, so Ctrl-C is forwarded as SIGTERM.
trap 'hand_on TERM' TERM INT
trap 'hand_on USR1' USR1
each_step check_local_step "$@"
each_step run_step "$@"
