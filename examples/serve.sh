#!/bin/sh
# Serve a model with farspan over OpenAI's API: examples/serve.sh [MODEL [vLLM's options …]]
# Without MODEL, the small bundled one. Then, elsewhere: .venv/bin/python examples/client.py
# Without min_seq_len flex is sparse where that is faster: in no prompt of a model as small as the bundled one.
set -eu
python=$(dirname "$0")/../.venv/bin/python
model=${1:-$("$python" -c 'from farspan.needle import model_dir; print(model_dir())')}
[ $# -eq 0 ] || shift
exec "$python" -m vllm.entrypoints.openai.api_server \
  --model "$model" --served-model-name demo --port "${PORT:-8000}" \
  --attention-backend CUSTOM \
  --additional-config '{"farspan": {"prefill": {"method": "flex", "gamma": 0.95, "min_seq_len": 8192}}}' \
  --max-model-len 16384 "$@"
