# Targets are one line of help each; what `make` does not list is not supported.
# Needs: Python 3.11+, make and git. `setup`, `image`, `demo-vm` and `test-vm` also need root on Debian or Raspberry Pi OS.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STATION := $(BIN)/python station.py
TARGET ?= local
ONLY ?=
# Workers take whole files, so that what a file sets up is set up once. WORKERS=0 runs one test after the other.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --durations=15
PACKAGES := image factory firmware_agent cloud station.py tests bench

.DEFAULT_GOAL := help
.PHONY: help demo demo-vm test test-vm check format lock setup image image-lock release cloud cloud-up cloud-down doctor bench clean

help: ## show this help
	@echo "Picket: put Raspberry Pi products into the world."
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

$(VENV)/.station: requirements/station.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Picket needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: install the package python3-venv, then try again."; exit 2; }
	@echo "Installing the Python packages (once)..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/station.lock
	@touch $@

$(VENV)/.image: requirements/image.lock $(VENV)/.station
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/image.lock
	@touch $@

$(VENV)/.development: requirements/development.lock $(VENV)/.image
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/development.lock
	@touch $@

demo: $(VENV)/.station ## from a blank simulated unit to its first SMS: no root, no AWS
	@$(STATION) demo --bench benches/simulated.toml

demo-vm: setup image ## the same on the real image in a virtual Pi
	@$(STATION) demo --bench benches/virtual.toml

test: $(VENV)/.development ## run the tests that need Python packages only
	@$(PYTEST) -n $(WORKERS) -m "not vm and not hardware"

test-vm: setup image $(VENV)/.development ## run the tests on the real image in a virtual Pi
	@$(PYTEST) -n $(WORKERS) -m "vm"

check: $(VENV)/.development ## lint, format, types, import arrows
	@$(BIN)/ruff check $(PACKAGES)
	@$(BIN)/ruff format --check $(PACKAGES)
	@$(BIN)/mypy $(PACKAGES)
	@$(BIN)/python -m pytest -q tests/test_imports.py

format: $(VENV)/.development ## format the code
	@$(BIN)/ruff format $(PACKAGES)
	@$(BIN)/ruff check --fix $(PACKAGES)

lock: $(VENV)/.development ## compile requirements/*.lock anew from pyproject.toml
	@$(BIN)/python requirements/compile.py

setup: ## install the system packages that are missing (root)
	@sh image/setup.sh

# Whose updates an image takes is decided when it is built. For trying out, all keys are made here, on one machine;
# for a product, hold the ceremony first (docs/fleet.md), and this rule finds the root that it made.
build/updates/repository/root.json: | $(VENV)/.station
	@mkdir -p build/updates
	@test -s build/updates/passphrase || (umask 077; $(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(24))' > build/updates/passphrase)
	@$(BIN)/python -m cloud keys init --passphrase-file build/updates/passphrase

image: setup $(VENV)/.image build/updates/repository/root.json ## build the OS image into build/image: RECIPE=file.toml
	@$(BIN)/python -m image build $(if $(RECIPE),--recipe $(RECIPE))

image-lock: setup $(VENV)/.image ## pin the newest version of each package: RECIPE=file.toml
	@$(BIN)/python -m image lock $(if $(RECIPE),--recipe $(RECIPE))

release: $(VENV)/.image ## build a release of the agent: VERSION=1.2.0 FROM=old.tar.zst
	@if [ "$(or $(FOR),device)" = device ]; then sh image/setup.sh; fi
	@$(BIN)/python -m image release --for $(or $(FOR),device) $(if $(VERSION),--version $(VERSION)) $(foreach old,$(FROM),--from $(old))

cloud: $(VENV)/.station ## deploy the stack to the local cloud, or TARGET=aws
	@if [ "$(TARGET)" = local ]; then $(BIN)/python -m cloud up; fi
	@$(BIN)/python -m cloud deploy --target $(TARGET)

cloud-up: $(VENV)/.station ## start the local cloud (loopback only, state is kept)
	@$(BIN)/python -m cloud up

cloud-down: $(VENV)/.station ## stop the local cloud
	@$(BIN)/python -m cloud down

doctor: $(VENV)/.station ## prove that the cloud refuses what it must refuse
	@$(BIN)/python -m cloud doctor --target $(TARGET)

bench: $(VENV)/.development ## measure speed against peers; ONLY=name runs one
	@$(BIN)/python bench/run.py $(if $(ONLY),--only $(ONLY))

clean: ## remove all that was built, the records of demos included
	@$(BIN)/python -m cloud down 2>/dev/null || true
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
