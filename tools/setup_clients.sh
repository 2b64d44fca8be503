#!/usr/bin/env bash
# Clients of the images API that tests/test_clients.py runs, in out/clients: LiteLLM and LangChain in a virtual
# environment of their own (570 MB), OpenAI's and LangChain's packages for Node where npm is.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p out/clients
python3 -m venv out/clients/venv
out/clients/venv/bin/pip install --quiet litellm langchain-community openai
if command -v npm >/dev/null; then
  npm install --silent --no-audit --no-fund --prefix out/clients openai @langchain/openai @langchain/core
else
  echo "no npm here: OpenAI's and LangChain's Node clients are left out"
fi
