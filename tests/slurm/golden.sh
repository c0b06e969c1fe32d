#!/bin/bash -l
# rdma-kv batch: 2 prefill engine(s) on 1 node(s); 4 decode engine(s) on 2 node(s)
#SBATCH --job-name=llama-2p4d
#SBATCH --output=/shared/runs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --mail-user=u@site.org
#SBATCH --mail-type=END,FAIL
#SBATCH --account='project 7'
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=3
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --constraint=a100
#SBATCH --gres=gpu:a100:2
#SBATCH --exclusive
#SBATCH --reservation='it'"'"'s ours'
#SBATCH --hint=nomultithread
#SBATCH --dependency=afterany:41
#SBATCH hetjob
#SBATCH --account='project 7'
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --constraint='h100&ib'
#SBATCH --gres=gpu:h100:2
#SBATCH --exclusive
#SBATCH --reservation='it'"'"'s ours'
#SBATCH --hint=nomultithread

set -e
folder=/shared/runs/llama-2p4d-$SLURM_JOB_ID
run=$folder/attempt-${SLURM_RESTART_COUNT:-0}
(
  umask 077
  mkdir -p "$run"
  cat >"$run/job.yaml" <<'END_OF_JOB'
model:
  name: org/model
  max_model_len: 4096
  gpu_memory_utilization: 0.9
  tensor_parallel_size: 1
  dtype: auto
  block_size: null
prefill:
  engines: 2
  nodes: 1
  constraint: a100
  gres: gpu:a100:2
  tensor_parallel_size: null
  vllm_args: []
  env: {}
decode:
  engines: 4
  nodes: 2
  constraint: h100&ib
  gres: gpu:h100:2
  tensor_parallel_size: null
  vllm_args: []
  env: {}
rdma:
  backend: auto
  devices: auto
  gid_index: auto
  traffic_class: 0
  service_level: 0
  block_size: 1048576
  queue_depth: 1024
  qps_per_peer: 2
  kv_buffer: null
  peer_timeout_s: 5.0
  connect_timeout_s: 15.0
  transfer_timeout_s: 300.0
  cancel_timeout_s: 5.0
  lease_s: 30.0
  checksum: false
  link: ''
  trace_file: ''
  load_failure_policy: recompute
orchestrator:
  host: auto
  port: auto
  policy: least_loaded
  disaggregate_above_tokens: 0
  api_key: auto
  heartbeat_s: 1.0
  engine_start_timeout_s: 600.0
  request_timeout_s: 600.0
  health_timeout_s: 10.0
  max_restarts: 3
  max_inflight: 256
slurm:
  account: project 7
  partition: gpu
  qos: high
  time: 1-00:00:00
  signal_s: 300
  one_component: false
  nodes: null
  cpus_per_task: 8
  mem: '0'
  exclusive: true
  segment: null
  options:
  - --reservation=it's ours
  - --hint=nomultithread
  modules:
  - cuda/12.6
  - gcc
  setup:
  - source /shared/venv/bin/activate
  - export NOTE="two words"
  mpi: null
  launcher: srun
END_OF_JOB
)
ln -sfn "${run##*/}" "$folder/latest"

module load cuda/12.6
module load gcc
source /shared/venv/bin/activate
export NOTE="two words"
export HF_HOME="$SCRATCH/hf"
export HF_HUB_OFFLINE=1
export SRUN_CPUS_PER_TASK=8
unset MODEL_NAME MODEL_MAX_LEN GPU_MEMORY_UTILIZATION TENSOR_PARALLEL_SIZE

exec /shared/venv/bin/rdma-kv batch '/home/u/my prompts.jsonl' -o /home/u/out.jsonl --concurrency 64 \
  --config "$run/job.yaml" --run-dir "$run"
