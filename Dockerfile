# Two stages: the first one builds all that is to be run, the second one holds only that and runs as nobody special.
#   docker build -t speed-serve .                         for CPUs
#   docker build -t speed-serve --build-arg TORCH=cuda .  for NVIDIA GPUs
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The pip of /opt/pip installs into /opt/speed, which has none.
RUN python -m venv /opt/pip && python -m venv --without-pip /opt/speed
WORKDIR /src

# Three layers, from what changes least to what changes most: torch, other dependencies, this project. Each has a folder
# of its own; what an earlier one has is not installed again. Only pyproject.toml decides about the first two.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /tmp/requirements.txt
ARG TORCH=cpu
# Where torch without CUDA is to be had; empty: where pip looks by itself.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Of torch's files those are left out that only serve to compile or to test extensions, and the byte code of the many
# modules that importing it doesn't load.
RUN case "$TORCH" in \
        cpu) index=${TORCH_CPU_INDEX:+--index-url $TORCH_CPU_INDEX} ;; \
        cuda) index= ;; \
        *) echo "TORCH must be cpu or cuda, not '$TORCH'" >&2; exit 1 ;; \
    esac \
    && grep '^torch' /tmp/requirements.txt > /tmp/torch.txt \
    && /opt/pip/bin/pip --python /opt/speed/bin/python install --no-compile $index -r /tmp/torch.txt \
    && cd /opt/speed/lib/python3*/site-packages/torch \
    && rm -rf include share test lib/*test*.so && find bin -type f ! -name torch_shm_manager -delete \
    && find /opt/speed -type d -name tests -prune -exec rm -rf {} + \
    && /opt/speed/bin/python -P -W ignore -c "import torch, jinja2.ext, jinja2.sandbox" \
    && if [ "$TORCH" = cuda ]; then /opt/speed/bin/python -P -c "import triton.language"; fi
# Of transformers only tokenizers are used, by a process of its own when a checkpoint has an older form of them: its
# models and its command line are left out, with the packages that only the latter asks for. Nor is any other command.
RUN /opt/pip/bin/pip --python /opt/speed/bin/python install --prefix /layers/dependencies/opt/speed \
        -r /tmp/requirements.txt \
    && find /layers/dependencies -type d -name tests -prune -exec rm -rf {} + \
    && cd /layers/dependencies/opt/speed/lib/python3*/site-packages \
    && for name in typer rich pygments markdown_it mdurl shellingham; do rm -rf "$name" "$name"[-_]*.dist-info; done \
    && rm -rf ../../../bin numpy/distutils numpy/f2py transformers/cli \
    && find transformers -type d -name __pycache__ -prune -exec rm -rf {} + \
    && find transformers/models -type f ! -path '*/auto/*' \( -name 'convert_*' -o -name 'modeling_*' \
        -o -name 'modular_*' -o -name '*processing_*' -o -name 'feature_extraction_*' \) -delete
COPY setup.py README.md LICENSE ./
COPY cli cli
COPY server server
COPY model model
RUN /opt/pip/bin/pip wheel --no-deps --wheel-dir /tmp/wheel . \
    && /opt/pip/bin/pip --python /opt/speed/bin/python install --no-deps --prefix /layers/package/opt/speed /tmp/wheel/*.whl

FROM ${BASE_IMAGE}
ARG TORCH=cpu
# Triton, in which the kernels for GPUs are written, compiles its launcher where it runs.
RUN if [ "$TORCH" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 10001 --no-create-home --home-dir /cache speed && install --directory --mode 1777 /cache
COPY --from=build /opt/speed /opt/speed
COPY --from=build /layers/dependencies /
COPY --from=build /layers/package /
# Nothing is written but to /cache: models of the hub, prices of passes. Any user may, that of --user too.
ENV PATH=/opt/speed/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache HF_HOME=/cache XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton \
    SPEED_HOST=0.0.0.0 SPEED_PORT=8000
VOLUME /cache
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"SPEED_PORT\"]}/ready', timeout=4)"]
ENTRYPOINT ["speed"]
CMD ["serve"]
