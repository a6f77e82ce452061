#!/usr/bin/env bash
# Submits a training run to a Ray cluster as a job: scripts/submit.sh recipe=ark3b run_dir=/shared/runs/ark3b [key=value ...]
# The cluster is RAY_ADDRESS, by default http://127.0.0.1:8265. The working directory travels without what .gitignore names.
# env=NAME,NAME  these variables of this shell go into the job (not secrets: see docs/cluster.md)
# doctor=true    looks whether the run can work there (opd.doctor), without running it
set -euo pipefail

usage="usage: scripts/submit.sh recipe=NAME run_dir=/absolute/path [env=NAME,NAME] [doctor=true] [section.key=value ...]"
if [ $# -eq 0 ]; then
    echo "$usage" >&2
    exit 2
fi
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            echo "$usage"
            sed -n '2,/^set /{s/^# //p}' "$0"
            exit 0 ;;
    esac
done
run_dir=""
names=""
module="opd.train"
arguments=()
for argument in "$@"; do
    case "$argument" in
        run_dir=/*) run_dir="${argument#run_dir=}"; arguments+=("$argument") ;;
        run_dir=*) echo "error: $argument: a job runs in a temporary copy of this folder; give an absolute path" >&2; exit 1 ;;
        env=*) names="${argument#env=}" ;;
        doctor=true) module="opd.doctor" ;;
        *) arguments+=("$argument") ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "error: run_dir=/absolute/path is missing: a job runs in a temporary copy of this folder" >&2
    exit 1
fi
shopt -s nocasematch # `http_proxy` is usual, too
for name in ${names//,/ }; do
    case "$name" in
        *[!A-Za-z0-9_]*) echo "error: env=$names: give names of variables, with commas between" >&2; exit 1 ;;
    esac
    case "$name" in
        PWD | OLDPWD) ;;
        *KEY* | *TOKEN* | *SECRET* | *PASS* | *PWD* | *AUTH* | *CRED*)
            echo "error: env=$name: Ray shows a job's variables to everybody who sees the dashboard; set it in the shell that" \
                "starts the head, or log in on the nodes (docs/cluster.md)" >&2
            exit 1 ;;
    esac
    if [ -z "${!name+set}" ]; then
        echo "error: env=$name: this variable is not set here; export it, or leave it out" >&2
        exit 1
    fi
    if [[ $name == *PROXY* && ${!name} == *@* ]]; then
        echo "error: env=$name: it may hold a password before its @, and Ray shows a job's variables to everybody who sees the" \
            "dashboard; set it in the shell that starts the head (docs/cluster.md)" >&2
        exit 1
    fi
    export "${name?}"
done
cd "$(dirname "$0")/.."
environment=$(python -c 'import json, os, sys; print(json.dumps({"env_vars": {n: os.environ[n] for n in sys.argv[1:]}}))' ${names//,/ })
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" --working-dir . --runtime-env-json "$environment" \
    -- python -m "$module" "${arguments[@]}"
