# syntax=docker/dockerfile:1
# docker build --target cpu -t regionclip .          # runs anywhere
# docker build --target cuda -t regionclip:cuda .    # needs an NVIDIA driver and its container toolkit
# docker run --rm -v "$PWD:/data" regionclip detect sample:cat vocabulary="cat, dog" out=found

FROM python:3.12-slim AS base
# OpenMP, which PyTorch and OpenCV compute with; git, for dependencies that are given by address.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libglib2.0-0 git \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# Downloaded weights and what `--help` reads lie on the mounted folder, so that the next container has them.
ENV CLIP_BASE_CACHE=/data/.cache/clip REGIONCLIP_CACHE=/data/.cache/regionclip HF_HOME=/data/.cache/huggingface
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./

FROM base AS cpu
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.6" "torchvision>=0.21"
COPY configs configs
COPY clip_base clip_base
COPY regionclip regionclip
RUN pip install ".[serve,hub,onnx,fast]"
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["regionclip"]
CMD ["--help"]

FROM base AS cuda
# The wheels of the package index bring CUDA's libraries; the driver is the host's.
RUN pip install "torch>=2.6" "torchvision>=0.21"
COPY configs configs
COPY clip_base clip_base
COPY regionclip regionclip
RUN pip install ".[serve,hub,onnx,fast]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["regionclip"]
CMD ["--help"]
