# Two stages: the first builds the environment, the second holds only it and runs as nobody special.
FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# pip's own setting: name PyTorch's CPU index here for an image without CUDA (2 GB smaller and more).
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/speed
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY cli cli
COPY server server
COPY model model
RUN /opt/speed/bin/pip install .

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 speed
COPY --from=build /opt/speed /opt/speed
ENV PATH=/opt/speed/bin:$PATH PYTHONUNBUFFERED=1 SPEED_HOST=0.0.0.0 SPEED_PORT=8000
USER speed
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["speed"]
CMD ["serve"]
