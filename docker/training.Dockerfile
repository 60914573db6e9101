# syntax=docker/dockerfile:1
# Training, and every other command. VARIANT=gpu sees the devices; VARIANT=cpu is for a first try.
# Up to "variants" this file and service.Dockerfile are the same, so both images share that layer.

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

FROM ${VARIANT} AS training
# For torch.compile: Triton on a GPU and Inductor on a CPU call a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
# Names of extras of pyproject.toml, beside the variant: hf reads datasets of the Hugging Face hub,
# s3 and gs shards in buckets.
ARG EXTRAS="hf"
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=build,source=/build/requirements,target=/requirements \
    for extra in $EXTRAS; do \
        pip install --compile --only-binary :all: \
            --constraint /requirements/constraints.txt --requirement "/requirements/$extra.txt" \
        || exit 1; \
    done
RUN groupadd --gid 10001 clipserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin \
        clipserve \
    && install --directory --owner 10001 --group 10001 /runs
RUN --mount=type=bind,from=build,source=/build/wheels,target=/wheels \
    pip install --compile --no-deps --no-index --no-cache-dir /wheels/*.whl

# The root file system may be read-only: runs and caches go to the volume, the rest to /tmp.
ENV HOME=/tmp \
    XDG_CACHE_HOME=/runs/.cache \
    HF_HOME=/runs/.cache/huggingface \
    CLIPSERVE_CACHE=/runs/.cache/clipserve \
    TORCHINDUCTOR_CACHE_DIR=/runs/.cache/inductor \
    TRITON_CACHE_DIR=/runs/.cache/triton
WORKDIR /runs
VOLUME /runs
USER 10001:10001
# A run that gets it ends after the step in hand, with a checkpoint.
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["clipserve"]
CMD ["--help"]

ARG REVISION=unknown
ARG VARIANT
LABEL org.opencontainers.image.title="clipserve training" \
    org.opencontainers.image.description="Pack, train, evaluate and embed with image-text models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision=$REVISION \
    org.opencontainers.image.variant=$VARIANT
