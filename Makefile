# Every target sets up what it needs; the second time that costs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
MODEL := .cache/smollm2-135m-instruct
STAMP := $(VENV)/.installed

export RAY_AUTH_MODE ?= disabled
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-cluster test lint docs bench storage ceph apiserver faults slurm clean

# Builds, verifies and publishes six engines of a real model (tp=3, pp=2) on a Ray cluster of this machine, and asks the release.
demo: $(STAMP) $(MODEL)/config.json
	$(BIN)/orchestrator plan cluster_configs/jobs/smollm2.yaml
	$(BIN)/orchestrator build cluster_configs/jobs/smollm2.yaml --cluster cluster_configs/local-ray.yaml
	$(BIN)/orchestrator run .cache/store/releases/smollm2-135m-instruct/1 "What is the capital of France?"

# Outside of CI, root: the same handed over with `orchestrator submit` to three Ray nodes in namespaces of this machine.
demo-cluster: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m benchmarks.three_nodes

# Two processes, each with whole files, the longest first.
test: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Writes what is generated in docs/: the fields of specs, the exit codes, what the plan of a 70B says.
docs: $(STAMP)
	$(BIN)/python -m docs.generate

bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.convert_vs_usual
	$(BIN)/python -m benchmarks.plan_scale
	$(BIN)/python -m benchmarks.simulate_scale
	$(BIN)/python -m benchmarks.stores
	$(BIN)/python -m benchmarks.verification
	$(BIN)/python -m benchmarks.miniature --build
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.pipelining

# Outside of CI: the whole demo on a real S3 server, builds through a proxy that hurts requests, two builds at once.
storage: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m benchmarks.storage --server seaweed
	$(BIN)/python -m benchmarks.storage_faults
	$(BIN)/python -m benchmarks.storage_race

# Outside of CI, root on Debian bookworm: stores and the whole demo on Ceph RGW over https.
ceph: $(STAMP) $(MODEL)/config.json
	command -v ceph-osd || (apt-get update -qq && apt-get install -y -qq --no-install-recommends radosgw ceph-mon ceph-osd)
	S3_SERVER=ceph $(BIN)/python -m pytest tests/stores/test_s3.py tests/stores/test_faults.py tests/integration/test_remote_source.py
	$(BIN)/python -m benchmarks.storage --server ceph

# A real Kubernetes API server for tests/integration/test_kubernetes_api.py: root on Debian bookworm, 6 to 15 minutes, once.
apiserver: .cache/kube-apiserver

.cache/kube-apiserver:
	tests/support/build_kube_apiserver.sh .cache

# Thirty builds on three real Ray nodes (namespaces of this machine, needs root), each with a fault at a random moment.
faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults

# The job scripts of cluster_configs/ under a real Slurm on this machine; says which Debian packages it needs.
slurm: $(STAMP)
	$(BIN)/python -m benchmarks.slurm

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

# torch first and alone: otherwise pip may choose a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(MODEL)/config.json: | $(STAMP)
	$(BIN)/python -m tests.support.smollm2 $(MODEL)
