#!/usr/bin/env bash
# Trains on a Slurm cluster with CUDA: one process a node, which has all GPUs of the node.
#
#   launch/slurm.sh --workdir=DIR --venv=DIR|--apptainer=FILE|--container-image=IMAGE [settings]
#                   [sbatch options] -- training flags
#
# The job saves before its time is up and goes back into the queue, until the run is finished.
#
#   --workdir=DIR            where the run lives; like all below, a path that every node sees
#   --venv=DIR               a virtual environment with this project in it
#   --apptainer=FILE         or an Apptainer image with it
#   --container-image=IMAGE  or an image for pyxis: a .sqsh file, or as enroot names it
#   --bind=DIR               a directory to show to the container, at the same path; may be repeated;
#                            the work directory and this checkout always are
#   --nodes=N                default 1
#   --gpus-per-node=N        default 8
#   --save-seconds=N         how long before the end of its time the job starts to save; default 600
#   --dry-run                print the submission instead of making it
#
# Other options, such as --partition=NAME, --account=NAME or --time=HH:MM:SS, are passed on to sbatch.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

tree=${here%/*}

parse() {
  workdir='' venv='' apptainer='' image='' nodes=1 gpus_per_node=8 save_seconds=600
  binds=() options=() training=()
  while (($#)); do
    case $1 in
      --workdir=*) workdir=${1#*=} ;;
      --venv=*) venv=${1#*=} ;;
      --apptainer=*) apptainer=${1#*=} ;;
      --container-image=*) image=${1#*=} ;;
      --bind=*) binds+=("${1#*=}") ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus-per-node=*) gpus_per_node=${1#*=} ;;
      --save-seconds=*) save_seconds=${1#*=} ;;
      --dry-run) dry_run=1 ;;
      -h | --help) usage && exit ;;
      --) training=("${@:2}") && break ;;
      -*) options+=("$1") ;;
      *) fail "'$1' is no option; give sbatch options as --name=value, training flags after --" ;;
    esac
    shift
  done
  need_count nodes gpus_per_node save_seconds
  check_training "$workdir" "${training[@]}"
  binds=("$tree" "$workdir" "${binds[@]}")
  local ways=(${venv:+venv} ${apptainer:+apptainer} ${image:+container-image})
  ((${#ways[@]} == 1)) ||
    fail "${#ways[@]} of --venv, --apptainer and --container-image given; give one"
  [[ -z $venv || -x $venv/bin/python ]] || fail "$venv/bin/python not found; see launch/README.md"
  [[ -z $apptainer || -f $apptainer ]] || fail "$apptainer not found; see launch/README.md"
}

# The words that start one process a node, up to the module's name. A process of srun may use one core
# unless told otherwise.
launcher() {
  local words=(srun --kill-on-bad-exit=1 --cpu-bind=none) bind mounts=''
  if [[ $venv ]]; then
    words+=("$venv/bin/python")
  elif [[ $apptainer ]]; then
    words+=(apptainer exec --nv)
    for bind in "${binds[@]}"; do words+=(--bind "$bind"); done
    words+=("$apptainer" python3)
  else
    for bind in "${binds[@]}"; do mounts+="${mounts:+,}$bind:$bind"; done
    words+=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$tree" python3)
  fi
  quoted "${words[@]}"
}

# JAX gives a process under Slurm one GPU unless told which; Slurm sends the signal of the time limit
# to the processes, not to this script, which only must outlive it. XLA may use the share of a GPU's
# memory that plans are made for; with its Triton kernels it would compile a program for minutes.
job_script() {
  local result
  result=$(quoted "$workdir/result.json")
  cat <<SCRIPT
#!/bin/bash
set -euo pipefail
cd $(quoted "$tree")
export PYTHONUNBUFFERED=1 JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1)))
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false \${XLA_FLAGS:-}"
trap 'echo "job \$SLURM_JOB_ID: told to end"' TERM
$(launcher) -m spg_jax.train --distributed $(quoted "--workdir=$workdir" "${training[@]}")
if [[ ! -f $result ]]; then
  echo "job \$SLURM_JOB_ID: saved, not finished; back into the queue"
  scontrol requeue "\$SLURM_JOB_ID"
fi
SCRIPT
}

submit() {
  local command=(
    sbatch --parsable --job-name=spg-jax "--nodes=$nodes" --ntasks-per-node=1
    "--gpus-per-node=$gpus_per_node" --exclusive --mem=0 --requeue "--signal=TERM@$save_seconds"
    --open-mode=append "--output=$workdir/slurm-%j.log" "${options[@]}"
  )
  if [[ $dry_run ]]; then
    run mkdir -p "$workdir"
    printf '%s <<'\''SCRIPT'\''\n%s\nSCRIPT\n' "$(quoted "${command[@]}")" "$(job_script)"
    return
  fi
  mkdir -p "$workdir"
  local job
  job=$("${command[@]}" <<<"$(job_script)")
  job=${job%%;*}
  cat <<TEXT
job $job
state   squeue --jobs=$job
logs    tail --follow=name $(quoted "$workdir/slurm-$job.log")
stop    scontrol update JobId=$job Requeue=0 && scancel --signal=TERM $job
TEXT
}

parse "$@"
submit
