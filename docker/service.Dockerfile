# syntax=docker/dockerfile:1
# The service. VARIANT=cpu searches with faiss-cpu, VARIANT=gpu with faiss-gpu and sees the devices.
# Up to "variants" this file and training.Dockerfile are the same, so both images share that layer.

# Pin further with --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG VARIANT=cpu

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY docker/requirements.py pyproject.toml constraints.txt ./
RUN python requirements.py
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv tools \
    && tools/bin/pip install --only-binary :all: \
        --constraint constraints.txt --requirement requirements/build.txt
COPY LICENSE README.md ./
COPY clipserve clipserve
COPY index index
COPY service service
COPY training training
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels .

FROM ${PYTHON_IMAGE} AS dependencies
ENV PATH=/opt/clipserve/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# PyTorch's index of wheels without CUDA makes the CPU image gigabytes smaller; see docs/docker.md.
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=build,source=/build/requirements,target=/requirements \
    python -m venv /opt/clipserve \
    && pip install --compile --only-binary :all: \
        --constraint /requirements/constraints.txt --requirement /requirements/base.txt

# variants
FROM dependencies AS cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=build,source=/build/requirements,target=/requirements \
    pip install --compile --only-binary :all: \
        --constraint /requirements/constraints.txt --requirement /requirements/cpu.txt

FROM dependencies AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=build,source=/build/requirements,target=/requirements \
    pip install --compile --only-binary :all: \
        --constraint /requirements/constraints.txt --requirement /requirements/gpu.txt

FROM ${VARIANT} AS service
# A fixed number, so that the owner of a volume stays the same from one version to the next.
RUN groupadd --gid 10001 clipserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin \
        clipserve \
    && install --directory --owner 10001 --group 10001 \
        /data /data/models /data/collections /data/jobs
COPY docker/healthcheck.py /opt/clipserve/healthcheck.py
RUN --mount=type=bind,from=build,source=/build/wheels,target=/wheels \
    pip install --compile --no-deps --no-index --no-cache-dir /wheels/*.whl

# The root file system may be read-only: caches go to the volume, everything else to /tmp.
ENV HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/data/cache \
    CLIPSERVE_CACHE=/data/cache/clipserve \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor \
    TRITON_CACHE_DIR=/data/cache/triton \
    CLIPSERVE_HOST=0.0.0.0 \
    CLIPSERVE_PORT=8000 \
    CLIPSERVE_COLLECTIONS_ROOT=/data/collections \
    CLIPSERVE_MODEL_ROOTS=/data/models \
    CLIPSERVE_JOBS_DIR=/data/jobs
WORKDIR /data
VOLUME /data
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "/opt/clipserve/healthcheck.py"]
ENTRYPOINT ["clipserve"]
CMD ["--help"]

ARG REVISION=unknown
ARG VARIANT
LABEL org.opencontainers.image.title="clipserve service" \
    org.opencontainers.image.description="Zero-shot classification and image-text search over REST" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision=$REVISION \
    org.opencontainers.image.variant=$VARIANT
