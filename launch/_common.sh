#!/usr/bin/env bash
# Functions for local.sh, slurm.sh and job.sbatch (source this file, do not run it): read options, split a
# command line into steps, and make the command of a step. Arguments are always arrays. No command is built
# as text and evaluated.
# shellcheck disable=SC2034  # the options are read by the scripts that source this file
set -euo pipefail

# The trainer's exit status after a stop by signal: it has saved, and the same command resumes it.
readonly REQUEUE_STATUS=85

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints its arguments as one line for a shell.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

set_default_options() {
  NODES=1
  GPUS=''
  PROCS=''
  MODULE=megatron_hydra.train
  PYTHON_BIN=''
  DRY_RUN=0
  WARM=0
  ARRAY_FILE=''
  ARRAY_LIMIT=''
  JOB_NAME=''
  TIME=''
  PARTITION=''
  ACCOUNT=''
  QOS=''
  CPUS=''
  AFTER=''
  SIGNAL_BEFORE=300
  MAX_REQUEUES=100
  CONTAINER=''
  MOUNTS=''
  LOGS=logs
  SBATCH_OPTIONS=()
}

print_usage() {
  cat << USAGE
usage: launch/$1 [options] STEP [--then [options] STEP] ...

$2

A STEP is one of
  CONFIG.yaml ... [key.path=value ...]   a training run, its verb is in the config: align, distill, ...;
                                         a later file overrides an earlier one
  SCRIPT.py [arguments ...]              any command of tools/ or data_prep/
Options stand before their step and hold for the steps after it until they are given again.

processes
  --nodes N             nodes of the run (default 1; local.sh knows one)
  --gpus-per-node N     GPUs of a node (default: slurm.sh 8, local.sh those that nvidia-smi lists)
  --procs-per-node N    processes of a node (default: one a GPU, or 1 without GPUs)
  --module NAME         Python module that trains (default $MODULE)
  --python PATH         interpreter (default: the active or the repository's .venv, then python3)
  --array FILE          one run for each line of FILE; its words are appended to the step (--array=: none)
  --warm                before each training run, compile its GPU kernels on one GPU of one node
                        (python -m megatron_hydra.warm; under SLURM a job of its own, which helps where the
                        caches ~/.triton and ~/.tilelang are on a disk that the nodes share)
  --dry-run             print the exact commands, run nothing

SLURM only (local.sh accepts and ignores them)
  --time LIMIT  --partition NAME  --account NAME  --qos NAME  --job-name NAME  --cpus-per-node N
  --after JOBID         start when that job has ended well
  --array-limit N       at most N runs of an array at a time
  --signal-before S     ask for a save S seconds before the time limit (default $SIGNAL_BEFORE)
  --max-requeues N      give up after N requeues (default $MAX_REQUEUES)
  --container IMAGE     run in this container (pyxis/enroot); --mounts SRC:DST,... mounts folders
  --logs DIR            where SLURM writes the output of the job (default $LOGS)
  --sbatch=OPTION       hand OPTION to sbatch as it is; may be repeated

exit status
  local.sh returns that of the run; $REQUEUE_STATUS: it was stopped by a signal, has saved, and the same command
  goes on. Under SLURM such a job is requeued, and a job that fails cancels those after it.

examples
  launch/$1 --gpus-per-node 8 configs/qwen3_1.7b/ours/align.yaml \\
      configs/qwen3_1.7b/layouts/8_gpus_short.yaml optimizer.lr=5e-4
  Q=configs/qwen3_1.7b
  launch/$1 --nodes 8 --time 24:00:00 \$Q/ours/align.yaml \$Q/layouts/64_gpus_short.yaml \\
      --then \$Q/ours/distill.yaml \$Q/layouts/64_gpus_short.yaml \\
      --then \$Q/ours/finetune.yaml \$Q/layouts/64_gpus_long.yaml
  launch/$1 --warm configs/qwen3_1.7b/ours/align.yaml configs/qwen3_1.7b/layouts/8_gpus_short.yaml
  launch/$1 --gpus-per-node 4 tools/select_heads.py --hf-path models/qwen3-1.7b --ratio 3:1 \\
      --output runs/head_map.json
USAGE
}

is_config() {
  [[ $1 == *.yaml || $1 == *.yml ]] && [[ $1 != *=* ]]
}

is_count() {
  [[ $1 =~ ^[1-9][0-9]*$ ]]
}

# Reads the options at the start of its arguments; sets TAKEN to their number of words.
take_options() {
  TAKEN=0
  local option value words
  while (($#)) && [[ $1 == -* && $1 != --then ]]; do
    option=$1 words=1
    case $option in
      --)
        ((TAKEN += 1))
        return
        ;;
      --dry-run)
        DRY_RUN=1
        shift
        ((TAKEN += 1))
        continue
        ;;
      --warm)
        WARM=1
        shift
        ((TAKEN += 1))
        continue
        ;;
      --*=*)
        value=${option#*=}
        option=${option%%=*}
        ;;
      *)
        (($# > 1)) || die "$option needs a value"
        value=$2 words=2
        ;;
    esac
    set_option "$option" "$value"
    shift "$words"
    ((TAKEN += words))
  done
}

set_option() {
  case $1 in
    --nodes | --gpus-per-node | --procs-per-node | --cpus-per-node | --array-limit | \
      --signal-before | --max-requeues)
      is_count "$2" || [[ $1 == --gpus-per-node && $2 == 0 ]] || die "$1 $2: it must be a number"
      ;;
  esac
  case $1 in
    --nodes) NODES=$2 ;;
    --gpus-per-node) GPUS=$2 ;;
    --procs-per-node) PROCS=$2 ;;
    --module) MODULE=$2 ;;
    --python) PYTHON_BIN=$2 ;;
    --array) ARRAY_FILE=$2 ;;
    --array-limit) ARRAY_LIMIT=$2 ;;
    --job-name) JOB_NAME=$2 ;;
    --time) TIME=$2 ;;
    --partition) PARTITION=$2 ;;
    --account) ACCOUNT=$2 ;;
    --qos) QOS=$2 ;;
    --cpus-per-node) CPUS=$2 ;;
    --after) AFTER=$2 ;;
    --signal-before) SIGNAL_BEFORE=$2 ;;
    --max-requeues) MAX_REQUEUES=$2 ;;
    --container) CONTAINER=$2 ;;
    --mounts) MOUNTS=$2 ;;
    --logs) LOGS=$2 ;;
    --sbatch) SBATCH_OPTIONS+=("$2") ;;
    *) die "option $1 is unknown; see --help" ;;
  esac
}

# Calls the function $1 once for every step of the remaining arguments, with STEP and options set.
each_step() {
  local callback=$1
  shift
  set_default_options
  (($#)) || die "no step given; see --help"
  while (($#)); do
    take_options "$@"
    shift "$TAKEN"
    STEP=()
    while (($#)) && [[ $1 != --then ]]; do
      STEP+=("$1")
      shift
    done
    ((${#STEP[@]})) || die "options without a step: give a CONFIG.yaml or a SCRIPT.py"
    ((WARM)) && is_config "${STEP[0]}" && before_training "$callback"
    "$callback"
    if (($#)); then
      shift
      (($#)) || die "--then needs another step"
    fi
  done
}

# Calls the function $1 for the same step, but to compile its kernels: one process on one GPU.
before_training() {
  local nodes=$NODES gpus=$GPUS procs=$PROCS module=$MODULE name=$JOB_NAME
  NODES=1 PROCS=1 MODULE=megatron_hydra.warm
  [[ $GPUS == 0 ]] || GPUS=1
  JOB_NAME=warm-${JOB_NAME:-$(basename "${STEP[0]%.*}")}
  "$1"
  NODES=$nodes GPUS=$gpus PROCS=$procs MODULE=$module JOB_NAME=$name
}

# Checks the steps now, because a job may fail only after hours in a queue.
check_step() {
  local word
  is_config "${STEP[0]}" || [[ ${STEP[0]} == *.py ]] ||
    die "step ${STEP[0]}: it must be a CONFIG.yaml or a SCRIPT.py"
  for word in "${STEP[@]}"; do
    [[ $word == "${STEP[0]}" ]] || { is_config "$word" && is_config "${STEP[0]}"; } || break
    [[ -f $word ]] || die "step $word: no such file (from $PWD)"
  done
  [[ -z $MOUNTS || -n $CONTAINER ]] || die "--mounts needs --container"
  if [[ -n $ARRAY_FILE ]]; then
    [[ -f $ARRAY_FILE ]] || die "--array $ARRAY_FILE: no such file (from $PWD)"
    read_array_lines
    ((${#ARRAY_LINES[@]})) || die "--array $ARRAY_FILE has no line"
  fi
}

# ARRAY_LINES: the lines of ARRAY_FILE without comments and blank lines.
read_array_lines() {
  local line
  ARRAY_LINES=()
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] || ARRAY_LINES+=("$line")
  done < "$ARRAY_FILE"
}

# Appends the words of line $1 (from 0) of ARRAY_FILE to STEP. Words are split at spaces; quotes have no
# special meaning.
append_array_line() {
  local words
  read_array_lines
  (($1 < ${#ARRAY_LINES[@]})) || die "--array $ARRAY_FILE has no line number $1"
  read -ra words <<< "${ARRAY_LINES[$1]}"
  STEP+=("${words[@]}")
}

# The Python interpreter with megatron_hydra on this machine; in a container its python3.
find_python() {
  local repository
  repository=$(dirname "$LAUNCH_DIR")
  if [[ -n $PYTHON_BIN ]]; then
    printf '%s\n' "$PYTHON_BIN"
  elif [[ -n $CONTAINER ]]; then
    printf 'python3\n'
  elif [[ -n ${VIRTUAL_ENV:-} ]]; then
    printf '%s\n' "$VIRTUAL_ENV/bin/python"
  elif [[ -x $repository/.venv/bin/python ]]; then
    printf '%s\n' "$repository/.venv/bin/python"
  else
    printf 'python3\n'
  fi
}

# Calls the function $1 with PROCS set: as given, else one process per GPU, else one. The default is not
# saved, because the next step may have other GPUs.
with_procs() {
  local given=$PROCS
  PROCS=${PROCS:-$((GPUS > 0 ? GPUS : 1))}
  "$@"
  PROCS=$given
}

# COMMAND: the command of one node for STEP. The arguments are torchrun's rendezvous options. A script with
# a single process needs no torchrun.
build_command() {
  COMMAND=("$(find_python)")
  if [[ ${STEP[0]} == *.py ]] && ((NODES * PROCS == 1)); then
    COMMAND+=("${STEP[@]}")
    return
  fi
  COMMAND+=("$LAUNCH_DIR/agent.py" --nnodes "$NODES" --nproc-per-node "$PROCS" "$@")
  if [[ ${STEP[0]} == *.py ]]; then
    COMMAND+=("${STEP[@]}")
  else
    COMMAND+=(-m "$MODULE")
    local index=0
    while ((index < ${#STEP[@]})) && is_config "${STEP[index]}"; do
      COMMAND+=(--config "${STEP[index]}")
      ((index += 1))
    done
    COMMAND+=("${STEP[@]:index}")
  fi
}
