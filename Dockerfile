# syntax=docker/dockerfile:1
# Two targets:  docker build .                     the server for CPUs
#               docker build --target cuda .       the server for NVIDIA GPUs
# Run:          docker run -p 50051:50051 -p 9090:9090 -v /path/to/checkpoint:/model:ro IMAGE --model rm=/model
# Another port: -e REWARDSERVE_PORT=6000, which the health check goes by too; it cannot see a --port among the flags.

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# What the server stands on has a layer of its own below: gigabytes, which a change of the server does not fetch anew.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = p['optional-dependencies']; names = p['dependencies'] + extras['cli'] + extras['server']; \
        print(*(name for name in names if not name.startswith('rewardserve[')), sep='\n')" > /requirements.txt
COPY server server
COPY kernels kernels
COPY docs docs
COPY protos protos
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS cuda
# torch.compile writes C++, and on a GPU Triton C, which is compiled as the server starts.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 rewardserve
COPY --from=wheel /requirements.txt /tmp/requirements.txt
# The default torch wheel for Linux carries CUDA.
RUN pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && pip check
# By number: Kubernetes' runAsNonRoot cannot tell who a name is.
USER 10001
ENV REWARDSERVE_HOST=0.0.0.0 REWARDSERVE_LOG_FORMAT=json
EXPOSE 50051 9090
HEALTHCHECK --interval=15s --timeout=10s --start-period=300s CMD ["rewardserve", "health"]
# The server finishes what is in flight on SIGTERM; give it `docker stop --time 40`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["rewardserve", "serve"]

FROM python:3.12-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 rewardserve
COPY --from=wheel /requirements.txt /tmp/requirements.txt
COPY constraints-cpu.txt /tmp/constraints-cpu.txt
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        --constraint /tmp/constraints-cpu.txt --requirement /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && pip check
USER 10001
ENV REWARDSERVE_HOST=0.0.0.0 REWARDSERVE_LOG_FORMAT=json
EXPOSE 50051 9090
HEALTHCHECK --interval=15s --timeout=10s --start-period=300s CMD ["rewardserve", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rewardserve", "serve"]
