# CPU image: docker build -t quire . && docker run --rm -p 8000:8000 -e QUIRE_API_KEY=… quire
# The container listens on all interfaces, so it wants a key; without one add: serve --insecure-no-auth
FROM python:3.12-slim AS build
# Compiles the CPU kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# torch publishes builds without the CUDA libraries, a fifth of the size, on an index of its own:
# --build-arg PIP_EXTRA_INDEX_URL=… takes them from there.
ARG PIP_EXTRA_INDEX_URL=""
RUN python -m venv /opt/quire && /opt/quire/bin/pip install --no-cache-dir .

FROM python:3.12-slim
# tini reaps orphans and forwards SIGTERM, which drains the server.
RUN apt-get update && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home quire \
 && install --directory --owner 10001 --group 0 --mode 0775 /cache
COPY --from=build /opt/quire /opt/quire
ENV PATH=/opt/quire/bin:$PATH \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    QUIRE_HOST=0.0.0.0
VOLUME /cache
WORKDIR /cache
USER 10001
EXPOSE 8000
# Weights may take minutes to load; the start period covers them, after it three failures in a row are an outage.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "quire"]
CMD ["serve"]
