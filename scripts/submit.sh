#!/usr/bin/env bash
# Submits a training run to a Ray cluster as a job: scripts/submit.sh recipe=ark3b run_dir=/shared/runs/ark3b [key=value ...]
# The cluster is RAY_ADDRESS, by default http://127.0.0.1:8265. The working directory travels without what .gitignore names.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: scripts/submit.sh recipe=NAME run_dir=/absolute/path [section.key=value ...]" >&2
    exit 2
fi
run_dir=""
for argument in "$@"; do
    case "$argument" in
        run_dir=/*) run_dir="${argument#run_dir=}" ;;
        run_dir=*) echo "error: $argument: a job runs in a temporary copy of this folder; give an absolute path" >&2; exit 1 ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "error: run_dir=/absolute/path is missing: a job runs in a temporary copy of this folder" >&2
    exit 1
fi
cd "$(dirname "$0")/.."
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" --working-dir . -- python -m opd.train "$@"
