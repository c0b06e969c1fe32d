# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# To be sourced: runs a command once on every node, and merges what the nodes say.

# Options of srun where no job is running yet, e.g. (-N 4 -p gpu).
SRUN_OPTIONS=()

# each_node COMMAND...: once on every node of this job, of all its components; without a job on
# nodes that srun gets by SRUN_OPTIONS; without those here.
each_node() {
  local common=(--overlap --mpi=none --kill-on-bad-exit=0) steps=() group variable
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    if [ ${#SRUN_OPTIONS[@]} -eq 0 ]; then
      "$@"
    else
      srun --mpi=none --kill-on-bad-exit=0 --ntasks-per-node=1 "${SRUN_OPTIONS[@]}" "$@"
    fi
    return
  fi
  # The counts in full: those of the batch job are in srun's environment.
  if [ -z "${SLURM_HET_SIZE:-}" ]; then
    steps=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@")
  else
    for ((group = 0; group < SLURM_HET_SIZE; group++)); do
      variable=SLURM_JOB_NUM_NODES_HET_GROUP_$group
      [ "$group" -eq 0 ] || steps+=(:)
      steps+=(--het-group="$group" --nodes="${!variable}" --ntasks="${!variable}"
        --ntasks-per-node=1 "$@")
    done
  fi
  srun "${common[@]}" "${steps[@]}" </dev/null
}

# as_node COMMAND...: runs it and prints its lines as NODE<tab>LINE, in one piece.
as_node() {
  local node text status=0
  node=$(uname -n)
  text=$("$@" 2>&1) || status=$?
  printf '%s\n' "${text:-ok}" | sed "s/^/${node%%.*}\t/"
  return "$status"
}

# merge_nodes: lines of as_node in; out the texts, each once, under the nodes that said it.
merge_nodes() {
  sort -s -V -k 1,1 | awk -F '\t' '
    NF < 2 { print > "/dev/stderr"; next }
    $1 != last { names[++count] = last = $1 }
    { line = $0; sub(/^[^\t]*\t/, "", line); said[last] = said[last] "  " line "\n" }
    END {
      for (i = 1; i <= count; i++) {
        text = said[names[i]]
        if (text in nodes) nodes[text] = nodes[text] "," names[i]
        else { nodes[text] = names[i]; order[++texts] = text }
      }
      for (i = 1; i <= texts; i++) printf "%s:\n%s", nodes[order[i]], order[i]
    }'
}
