#!/bin/bash
# smart_stop.sh [JOB] [option of `rdma-kv stop`]...: end a job in order, and what would take over from it.
#   JOB is a job id, a job's name or its run folder; without it the only job that has not ended.
#   Exit code: 0 ended; 1 not ended, or Slurm cannot be asked; 2 unknown job.
# Without an environment to run rdma-kv in, a job id is cancelled by scancel alone.
set -euo pipefail
case ${1:-} in -h | --help)
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 0
  ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for program in "${RDMA_KV:-}" "$root/.venv/bin/rdma-kv" "$(command -v rdma-kv || true)"; do
  [ -n "$program" ] && [ -x "$program" ] && exec "$program" stop "$@"
done
echo "smart_stop.sh: no rdma-kv in $root/.venv/bin nor on PATH (env/install_all_nodes.sh makes it)" >&2
job=${1:-}
if [[ $job =~ ^[0-9]+(\+[0-9]+)?$ ]] && command -v scancel >/dev/null; then
  # SIGTERM to the batch script drains; Slurm's own TERM goes to the engines too.
  echo "smart_stop.sh: asking job ${job%+*} to stop in order; if it stays: scancel ${job%+*}" >&2
  exec scancel --batch --signal=TERM "${job%+*}"
fi
echo "smart_stop.sh: give a job id, and have scancel on PATH" >&2
exit 2
