# `make demo` runs the main job on real data; `make test` runs the tests. Both install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow browser deployment postgresql faults drills lint bench audit recompute coverage openapi contract lock clean fuzz anchor containers

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/islet demo

# In two processes, a file of tests to one of them: its fixtures (a finished demo, a built node) are made once.
test: .venv/installed
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

# The long drills: every kill point of a round, every disk fault of the ledger.
test-slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

# Every page in a real browser: clicks, keyboard, contrast, console; pictures go to browser-shots/. It needs Chromium: on
# Debian `apt-get install --no-install-recommends chromium fonts-liberation`. Nothing is skipped without it: it fails.
browser: .venv/installed
	$(BIN)/python -m pytest -q -m browser tests/browser

# A federation of real processes: SuperLink, SuperExec and three hospitals' nodes over TLS on the loopback interface.
deployment: .venv/installed
	$(BIN)/python -m pytest -q -p no:randomly -m deployment tests/deployment

# Two hundred rounds under random faults, from a seed: kills, lost and late messages, full disks, spoilt checkpoints.
faults: .venv/installed
	$(BIN)/python -m tests.faults --rounds 200 --seed 1

# Real processes killed, cut off, slowed down and filled up in the middle of rounds, over an hour for all;
# DRILLS="superlink disk/reserved" takes those that begin so. On Debian `apt-get install faketime`; a full disk needs root.
drills: .venv/installed
	$(BIN)/python -m tests.deployment.drills $(DRILLS)

# A federation in containers: builds the images (BASE, NGINX and PODMAN_BUILD_OPTIONS say from what) and runs them.
containers: .venv/installed
	PYTHON=$(BIN)/python deploy/containers.sh

# MLflow's records in a real PostgreSQL server; on Debian `apt-get install postgresql`.
postgresql: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock 'psycopg[binary]'
	$(BIN)/python -m pytest -q -m postgresql tests/deployment

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The contract of the forecast endpoint, committed so that a change of it is seen.
openapi: .venv/installed
	$(BIN)/python -m hospital_node.openapi_document docs/openapi.json

# A thousand generated requests to each operation of a real endpoint: no 5xx, no answer that the contract lacks.
contract: .venv/installed
	$(BIN)/python -m tests.hospital_node.contract

# What training costs and what one would use instead, in half an hour or so. jax_privacy and darts want other packages
# than ours, so they live by themselves.
bench: .venv/installed .venv-jax/installed .venv-peer/installed
	$(BIN)/python -m benchmarks --jax .venv-jax/bin/python

.venv-jax/installed:
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/pip install --quiet --disable-pip-version-check jax-privacy==2.0.0 jax==0.10.2
	touch $@

.venv-peer/installed:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'darts[torch]==0.48.1'
	touch $@

# Canary patients on the real training path and on planted bugs: a table, and a picture in audit-run/.
audit: .venv/installed
	$(BIN)/python -m benchmarks.audit audit-run

# Epsilon of budget books by Google's dp-accounting, which wants older packages than ours and so lives by itself.
# NODES="demo-run/nodes/duke ..." takes those of node folders; without it, trial books of every shipped plan.
recompute: .venv/installed .venv-recompute/installed
	$(BIN)/python -m benchmarks.recompute $(NODES) | .venv-recompute/bin/python benchmarks/dp_accounting_check.py

.venv-recompute/installed:
	$(PYTHON) -m venv .venv-recompute
	.venv-recompute/bin/pip install --quiet --disable-pip-version-check dp-accounting==0.6.0
	touch $@

# The ledger on a local EVM chain: in the process, and anvil. An environment of its own, because chains pin much.
anchor:
	$(PYTHON) -m venv .venv-anchor
	.venv-anchor/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev,anchor]' \
		vyper==0.4.3 eth-tester==0.14.0b1 py-evm==0.12.1b1
	npm install --silent --no-fund --no-audit --prefix .venv-anchor @foundry-rs/anvil
	PATH=$(CURDIR)/.venv-anchor/node_modules/.bin:$$PATH .venv-anchor/bin/python -m pytest -q tests/anchor

# Every branch of what guards patients' privacy budget is taken by a test, or this fails.
PRIVACY_TESTS := tests/privacy --ignore=tests/privacy/test_audit.py \
	tests/pipeline/test_private_training.py tests/pipeline/test_gate_tap.py tests/pipeline/test_horizon_curves.py \
	tests/pipeline/test_auditing.py \
	tests/pipeline/test_membership.py tests/pipeline/test_accounting.py tests/hospital_node/test_budget.py \
	tests/hospital_node/test_local_round.py tests/hospital_node/test_scoring.py tests/hospital_node/test_release.py \
	tests/federation/test_secure_aggregation.py

coverage: .venv/installed
	$(BIN)/python -m coverage run -m pytest -q $(PRIVACY_TESTS)
	$(BIN)/python -m coverage report --show-missing --fail-under=100

# Coverage-guided fuzzing of every reader, in an environment of its own; FUZZ_SECONDS=600 is the full drill.
FUZZ_SECONDS ?= 60
fuzz:
	test -d .venv-fuzz || $(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		atheris==3.0.0 pandas pyarrow pydantic rfc8785 tzdata
	for layout in $$(ls data_schemas/layouts | sed 's/\.toml$$//' | grep -v mostoles); do \
		PYTHONPATH=. .venv-fuzz/bin/python -m tests.hospital_node.fuzz_readers $$layout $(FUZZ_SECONDS) || exit 1; done

# The lock is what a new environment resolves to, torch without its local build tag.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,postgresql]'
	.venv-lock/bin/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-fuzz .venv-jax .venv-peer .venv-recompute build dist *.egg-info demo-run audit-run browser-shots .coverage
