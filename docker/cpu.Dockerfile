# docker build -f docker/cpu.Dockerfile -t vllm-kvcompress-cpu .
# docker run -p 8000:8000 vllm-kvcompress-cpu /src/examples/shapes/model --dtype float32 --attention-backend kvcompress
FROM python:3.12-slim
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make libnuma1 \
 && rm -rf /var/lib/apt/lists/*
# vLLM's CPU wheel wants PyTorch's CPU build.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY . /src
WORKDIR /src
RUN make .venv/.ready
ENV PATH=/src/.venv/bin:$PATH
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
