#!/usr/bin/env bash
# Submits steps to SLURM with the interface of local.sh. Each step waits for the step before it.
set -euo pipefail

LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=_common.sh
source "$LAUNCH_DIR/_common.sh"

# SBATCH: the submission of STEP. PREVIOUS is the job before it in this chain, or empty.
build_submission() {
  local name=${JOB_NAME:-$(basename "${STEP[0]%.*}")} kind=afterok
  SBATCH=(
    sbatch --parsable --job-name="$name" --nodes="$NODES" --ntasks-per-node=1 --requeue
    --open-mode=append --signal="USR1@$SIGNAL_BEFORE" --kill-on-invalid-dep=yes
  )
  if [[ -n $ARRAY_FILE ]]; then
    read_array_lines
    SBATCH+=(--array="0-$((${#ARRAY_LINES[@]} - 1))${ARRAY_LIMIT:+%$ARRAY_LIMIT}")
    SBATCH+=(--output="$LOGS/%x-%A_%a.out")
    # Line n of this step follows line n of the step before, not the whole array.
    [[ -z $PREVIOUS_ARRAY ]] || kind=aftercorr
  else
    SBATCH+=(--output="$LOGS/%x-%j.out")
  fi
  local after=${PREVIOUS:-$AFTER}
  [[ -z $after ]] || SBATCH+=(--dependency="$kind:$after")
  ((GPUS == 0)) || SBATCH+=(--gpus-per-node="$GPUS")
  [[ -z $CPUS ]] || SBATCH+=(--cpus-per-task="$CPUS")
  [[ -z $TIME ]] || SBATCH+=(--time="$TIME")
  [[ -z $PARTITION ]] || SBATCH+=(--partition="$PARTITION")
  [[ -z $ACCOUNT ]] || SBATCH+=(--account="$ACCOUNT")
  [[ -z $QOS ]] || SBATCH+=(--qos="$QOS")
  SBATCH+=("${SBATCH_OPTIONS[@]}")
}

# JOB: job.sbatch and its arguments, which contain all data that the job needs.
build_job() {
  JOB=(
    "$LAUNCH_DIR/job.sbatch" --launch-dir "$LAUNCH_DIR" --nodes "$NODES" --procs-per-node "$PROCS"
    --module "$MODULE" --python "$(find_python)" --max-requeues "$MAX_REQUEUES"
  )
  [[ -z $CONTAINER ]] || JOB+=(--container "$CONTAINER")
  [[ -z $MOUNTS ]] || JOB+=(--mounts "$MOUNTS")
  [[ -z $ARRAY_FILE ]] || JOB+=(--array "$ARRAY_FILE")
  JOB+=(-- "${STEP[@]}")
}

submit_step() {
  local answer
  GPUS=${GPUS:-8}
  build_submission
  with_procs build_job
  if ((DRY_RUN)); then
    show "${SBATCH[@]}" "${JOB[@]}"
    echo "# which runs, on its first node:"
    "$BASH" "${JOB[0]}" --dry-run "${JOB[@]:1}"
    answer=JOBID_OF_${STEP[0]##*/}
  else
    mkdir -p "$LOGS"
    answer=$("${SBATCH[@]}" "${JOB[@]}")
    printf 'submitted %s: %s%s\n' "${answer%%;*}" "${STEP[0]}" "${PREVIOUS:+ (after $PREVIOUS)}"
  fi
  PREVIOUS=${answer%%;*}
  PREVIOUS_ARRAY=$ARRAY_FILE
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  set_default_options
  print_usage slurm.sh 'Submits each step as a job (or a job array) that waits for the one before it.'
  exit 0
fi
PREVIOUS='' PREVIOUS_ARRAY=''
each_step check_step "$@"
((DRY_RUN)) || command -v sbatch > /dev/null || die "sbatch was not found: run this on a SLURM machine"
each_step submit_step "$@"
