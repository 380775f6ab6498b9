#!/bin/sh
# Serve a model with farspan over OpenAI's API: examples/serve.sh [MODEL [vLLM's options …]]
# Without MODEL, the small bundled one. Then, elsewhere: .venv/bin/python examples/client.py
set -eu
python=$(dirname "$0")/../.venv/bin/python
model=${1:-$("$python" -c 'from farspan.needle import model_dir; print(model_dir())')}
[ $# -eq 0 ] || shift
exec "$python" -m vllm.entrypoints.openai.api_server \
  --model "$model" --served-model-name demo --port "${PORT:-8000}" \
  --attention-backend CUSTOM \
  --additional-config '{"farspan": {"prefill": {"method": "flex", "gamma": 0.95}}}' \
  --max-model-len 16384 "$@"
