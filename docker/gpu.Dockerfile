# docker build -f docker/gpu.Dockerfile -t vllm-kvcompress .
# docker run --gpus all -p 8000:8000 vllm-kvcompress deepseek-ai/Janus-Pro-1B --attention-backend kvcompress
# The image's entry point is vLLM's: `vllm serve`.
FROM vllm/vllm-openai:v0.32.0
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src
