#!/bin/bash
# smart_run.sh [--local] [--stage DIR] [--engines-per-node N] [nP nD] CONFIG [PROMPTS OUT] [option]...
#
#   sbatch -N 4 --gres=gpu:4 sbatch/smart_run.sh 1 3 CONFIG    1 node prefills, 3 decode: a URL
#   salloc -N 2 sbatch/smart_run.sh CONFIG PROMPTS OUT         half and half: a file of prompts
#   sbatch/smart_run.sh --local 1 2 CONFIG                     without Slurm: 1 and 2 engines here
#
# Runs CONFIG over whatever nodes it is given, split into nP for prefill and nD for decode (half and
# half if not said); the nodes of a job of two components are split already. A node runs as many
# engines as its GPUs allow, one without GPUs. --stage DIR: first copy environment and model to DIR
# on each node's own disk (env/smart_deploy.sh). Other options are those of rdma-kv serve or batch.
# Exit code: that of rdma-kv; 2 for what does not fit.
#SBATCH --job-name=rdma-kv
#SBATCH --output=%x-%j.out
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

say() { echo "smart_run.sh: $*" >&2; }
bad() { say "$@"; exit 2; }
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }

local_run=no stage='' per_node=''
while [ $# -gt 0 ]; do
  case $1 in
    --local) local_run=yes; shift ;;
    --stage | --engines-per-node)
      [ $# -ge 2 ] || bad "$1 needs a value"
      if [ "$1" = --stage ]; then stage=$2; else per_node=$2; fi
      shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) bad "unknown option $1; options of rdma-kv stand behind CONFIG" ;;
    *) break ;;
  esac
done
split=()
if [[ ${1:-} =~ ^[0-9]+$ && ${2:-} =~ ^[0-9]+$ ]]; then
  split=("$1" "$2")
  shift 2
fi
[ $# -ge 1 ] || { usage >&2; exit 2; }
config=$(realpath -- "$1")
[ -f "$config" ] || bad "there is no job file $1"
shift
command=(serve) kind=serve
if [ $# -ge 2 ] && [[ $1 != -* && $2 != -* ]]; then
  command=(batch "$1" -o "$2") kind=batch
  shift 2
fi

# Slurm runs a copy of this file: the repository is where it was submitted, unless said otherwise.
root=${RDMA_KV_ROOT:-$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)}
[ -f "$root/env/smart_deploy.sh" ] || root=${SLURM_SUBMIT_DIR:-$PWD}
rdma_kv=${RDMA_KV:-$root/.venv/bin/rdma-kv}
[ -x "$rdma_kv" ] || rdma_kv=$(command -v rdma-kv) || {
  say "no rdma-kv in $root/.venv/bin nor on PATH (env/install_all_nodes.sh makes it); or set RDMA_KV"
  exit 1
}

set_engines() { # NODES_OF_PREFILL NODES_OF_DECODE ENGINES_OF_A_NODE
  overrides+=(--set "prefill.engines=$(($1 * $3))" --set "decode.engines=$(($2 * $3))")
}

overrides=()
if [ "$local_run" = yes ]; then
  # Nor over the nodes of a job that this may run in.
  unset "${!SLURM_@}"
  [ ${#split[@]} -eq 0 ] || set_engines "${split[@]}" 1
  [ -z "$stage" ] || bad "--stage is for nodes, and this is --local"
  exec "$rdma_kv" "${command[@]}" --config "$config" "${overrides[@]}" "$@"
fi
[ -n "${SLURM_JOB_ID:-}" ] || bad "not in a job of Slurm: sbatch or salloc it, or give --local"

if [ -z "$per_node" ]; then
  width=$("$rdma_kv" config "$config" | awk '$1 == "tensor_parallel_size:" { print $2; exit }')
  gpus=${SLURM_GPUS_ON_NODE:-0}
  [ "$gpus" -eq 0 ] || [ "$gpus" -ge "$width" ] ||
    bad "an engine wants $width GPUs (model.tensor_parallel_size), and a node has $gpus"
  per_node=$((gpus >= width ? gpus / width : 1))
fi
nodes=$SLURM_JOB_NUM_NODES
if [ "${SLURM_HET_SIZE:-1}" -eq 2 ]; then
  have=("$SLURM_JOB_NUM_NODES_HET_GROUP_0" "$SLURM_JOB_NUM_NODES_HET_GROUP_1")
  [ ${#split[@]} -eq 0 ] || [ "${split[*]}" = "${have[*]}" ] ||
    bad "the job's components have ${have[0]} and ${have[1]} nodes, not ${split[0]} and ${split[1]}"
  split=("${have[@]}")
else
  overrides+=(--set slurm.one_component=true --set "slurm.nodes=$nodes")
  if [ ${#split[@]} -eq 0 ]; then
    # One node alone runs both.
    split=($((nodes > 1 ? nodes / 2 : 1)) $((nodes > 1 ? nodes - nodes / 2 : 1)))
    [ "$nodes" -gt 1 ] || [ "$per_node" -lt 2 ] || per_node=$((per_node / 2))
  elif [ $((split[0] + split[1])) -ne "$nodes" ]; then
    bad "${split[0]} + ${split[1]} nodes are asked for, the job has $nodes"
  fi
fi
if [ "${split[0]}" -lt 1 ] || [ "${split[1]}" -lt 1 ]; then
  bad "each role needs a node: ${split[*]}"
fi
overrides+=(--set "prefill.nodes=${split[0]}" --set "decode.nodes=${split[1]}")
set_engines "${split[@]}" "$per_node"

if [ -n "$stage" ]; then
  model=$("$rdma_kv" config "$config" | awk '/^model:/ { m = 1 } m && $1 == "name:" { print $2; exit }')
  what=(--env "$(dirname "$(dirname "$rdma_kv")")")
  [ ! -d "$model" ] || what+=(--model "$model")
  RDMA_KV_MODEL=
  assignments=$("$root/env/smart_deploy.sh" --to "$stage" "${what[@]}")
  eval "$assignments"
  rdma_kv=$RDMA_KV
  [ -z "$RDMA_KV_MODEL" ] || overrides+=(--set "model.name=$RDMA_KV_MODEL")
fi
say "prefill on ${split[0]} node(s), decode on ${split[1]}, $per_node engine(s) on each"
run=$("$rdma_kv" adopt "$kind" "$config")
exec "$rdma_kv" "${command[@]}" --config "$config" --run-dir "$run" "${overrides[@]}" "$@"
