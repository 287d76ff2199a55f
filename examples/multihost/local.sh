#!/bin/bash
# Two processes on this machine with four simulated devices each; all arguments go to pretrain.py:
# examples/multihost/local.sh --mesh data=2,fsdp=2,tensor=2 --steps 50
export XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu
program="${PYTHON:-.venv/bin/python} $(dirname "$0")/../pretrain.py"
together=(--coordinator "localhost:${PORT:-12355}" --processes 2)
$program "$@" "${together[@]}" --process 0 & first=$!
$program "$@" "${together[@]}" --process 1 & second=$!
wait $first && wait $second
