# CUDA: docker build -t llava-med:cuda .
# CPU:  docker build --build-arg TORCH_INDEX=URL -t llava-med:cpu .     (the index of torch's builds for CPUs)
# Then: docker run --rm -p 127.0.0.1:7860:7860 -p 127.0.0.1:8000:8000 -e LLAVA_API_KEYS=A_KEY_OF_YOURS \
#           -v "$PWD/checkpoints:/checkpoints" llava-med:cpu serve --host 0.0.0.0 --model-path /checkpoints/mine
#       (the page asks for the key as password)
# For research only; never for clinical use.
FROM python:3.11-slim
ARG TORCH_INDEX=
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home research
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY llava ./llava
RUN version=$(sed -n 's/^torch==//p' constraints.txt) && \
    pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version" && \
    grep -v '^torch==' constraints.txt > /tmp/constraints.txt && \
    pip install --no-cache-dir -c /tmp/constraints.txt '.[serve,medical,openai]'
USER research
WORKDIR /home/research
ENV HF_HOME=/home/research/.cache/huggingface
EXPOSE 7860 8000
ENTRYPOINT ["llava-med"]
CMD ["--help"]
