# Servers without a model: mount a repository, made with `diffuserve assemble`, at /models.
#
#   docker build --target cpu --tag diffuserve:cpu .
#   docker run --rm --shm-size 1g --publish 127.0.0.1:8000-8002:8000-8002 \
#       --volume "$PWD/triton_repo:/models:ro" diffuserve:cpu
#
# `gpu` is the same on NVIDIA's Triton, for repositories assembled with --backend; it takes `--gpus all` to run.
# Triton authenticates nobody. In a container it must listen on every address to be reached at all, so publish its ports
# on loopback, or behind a proxy that asks who calls.

# Releases before 26.07 have published vulnerabilities.
ARG TRITON_VERSION=26.07

FROM python:3.11-slim AS cpu-build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY diffuserve diffuserve
COPY export export
COPY handlers handlers
COPY client client
COPY loadtest loadtest
COPY training training
RUN python3 -m venv /opt/diffuserve \
    && /opt/diffuserve/bin/pip install --no-cache-dir --constraint constraints.txt ".[serve,openvino]"

# The Triton inside the nvidia-pytriton package is old and has published vulnerabilities: for trying diffuserve out.
FROM python:3.11-slim AS cpu
RUN useradd --create-home --uid 10001 diffuserve
COPY --from=cpu-build /opt/diffuserve /opt/diffuserve
ENV PATH=/opt/diffuserve/bin:$PATH
USER 10001
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["diffuserve"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0"]

# The engines are Triton's own backends here, so that only what the in-flight loop needs is installed.
FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3 AS gpu-build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY diffuserve diffuserve
COPY export export
COPY handlers handlers
COPY client client
COPY loadtest loadtest
COPY training training
RUN python3 -m venv --without-pip /opt/diffuserve \
    && python3 -m pip --python /opt/diffuserve/bin/python3 install --no-cache-dir --constraint constraints.txt .

FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3 AS gpu
RUN useradd --create-home --uid 10001 diffuserve
COPY --from=gpu-build /opt/diffuserve /opt/diffuserve
ENV PATH=/opt/diffuserve/bin:$PATH
USER 10001
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["diffuserve"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0"]
