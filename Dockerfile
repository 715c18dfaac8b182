# syntax=docker/dockerfile:1
# Two images of one base; docs/deploy.md runs them, `make image-check` proves the first without Docker.
#
#   docker build --tag quire .                        for processors
#   docker build --tag quire:cuda --target cuda .     for NVIDIA GPUs
#
#   base ─┬─▶ build ────┬─▶ cpu
#         └─▶ runtime ──┴─▶ cuda

# The digest decides; the tag tells people which one it is.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE} AS base
# Of Debian, with spaces: what else is wanted in the image.
ARG PACKAGES=""
# Security updates of the base are part of a build; tini reaps orphans and forwards SIGTERM, which drains the server.
RUN apt-get update \
 && apt-get upgrade --yes \
 && apt-get install --yes --no-install-recommends ca-certificates python3 tini ${PACKAGES} \
 && rm -rf /var/lib/apt/lists/*

FROM base AS build
# g++ compiles the CPU kernels.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# pip stays here: what is installed below goes without it.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/pip \
 && /opt/pip/bin/pip wheel --no-deps --wheel-dir /wheels . \
 && python3 -m venv --without-pip /opt/quire

# torch as everybody gets it brings CUDA's libraries. Its builds without them, a fifth of the size, are on an index of
# their own: --build-arg PIP_EXTRA_INDEX_URL=… takes them from there.
ARG PIP_EXTRA_INDEX_URL=""
# Of pyproject.toml, with commas: otel, ray.
ARG EXTRAS=otel
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/quire/bin/python install "$(echo /wheels/quire-*.whl)[${EXTRAS}]"

FROM base AS runtime
# Group 0 may write what the user may: some clusters give a container any user id, and that group.
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home --shell /usr/sbin/nologin quire \
 && install --directory --owner 10001 --group 0 --mode 0775 /cache
# Everything that is written at run time lies in /cache, temporary files included where there is no /tmp to write to.
# PYTHONSAFEPATH: no module is looked for in the working directory, which anybody's model may have filled.
ENV PATH=/opt/quire/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    QUIRE_HOST=0.0.0.0 \
    QUIRE_HEALTH_PORT=8001
VOLUME /cache
WORKDIR /cache
USER 10001
EXPOSE 8000 8001
# A port and a thread of its own: in time however busy the server is. Weights may take long to load; the start period
# covers them, and after it three failures in a row are an outage.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as web; web.urlopen('http://127.0.0.1:' + os.environ['QUIRE_HEALTH_PORT'] + '/health', timeout=2)"]
# The server listens on all interfaces, so it wants a key (QUIRE_API_KEY), or: serve --insecure-no-auth
ENTRYPOINT ["/usr/bin/tini", "--", "quire"]
CMD ["serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Quire" \
      org.opencontainers.image.description="An inference-serving engine for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"

FROM runtime AS cuda
# CUDA's libraries come with torch, and the driver from the host, so NVIDIA's images would only add a second copy. Triton
# compiles its kernels' launchers where it runs.
USER 0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/quire /opt/quire
RUN ["python", "-c", "import torch; exit(None if torch.version.cuda else 'this torch has no CUDA: leave PIP_EXTRA_INDEX_URL out')"]
# Read by NVIDIA's container runtime: which devices, what of the driver, and which drivers are too old for CUDA 13.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0"
USER 10001

FROM runtime AS cpu
COPY --from=build /opt/quire /opt/quire
