# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all of their own set-up on Debian 12 and Ubuntu 24.04.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DEMO_CONFIG := jobs/configs/smollm2-135m-1p1d-cpu.yaml
SANITIZERS := address,undefined thread
# The extension too is built once with warnings as errors.
BINDINGS = -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

.PHONY: help setup demo test unit verbs slurm e2e lint native-test stubs clean
.PHONY: gpu bench-gpu bench-gpu-engine bench-engine bench-pd bench-verbs bench-posting faults-verbs cycles-verbs e2e-verbs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## system packages, .venv, vLLM's CPU build, the small model, the extension
	@env/setup.sh

demo: setup  ## a prompt file through one prefill and one decode engine on this machine
	$(BIN)/rdma-kv batch jobs/examples/prompts.jsonl -o runs/demo/answers.jsonl \
	  --config $(DEMO_CONFIG) --run-dir runs/demo --concurrency 4 --restart

test: setup lint native-test unit verbs slurm e2e  ## everything that can be tested on one machine

unit: setup  ## tests without vLLM, guests and Slurm
	$(BIN)/python -m pytest -m 'not e2e and not verbs and not slurm'

verbs: setup  ## the verbs engine on real kernel verbs: guests with Soft-RoCE
	$(BIN)/python -m pytest -m 'verbs and not e2e'

slurm: setup  ## the Slurm suite on a real Slurm of several nodes, in namespaces
	$(BIN)/python -m pytest -m 'slurm and not e2e'

e2e: setup  ## tests with real vLLM engines (minutes)
	$(BIN)/python -m pytest -m 'e2e and not verbs'

lint: setup  ## ruff, mypy, import directions, clang-format, stub drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'native/*.cc' 'native/*.h')

native-test: setup  ## gtest of the engine, plain and under ASan+UBSan and TSan
	@for san in none $(SANITIZERS); do \
	  dir=build/native-$$(echo $$san | tr , -); \
	  $(BIN)/cmake -S native -B $$dir -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DRKV_BUILD_TESTS=ON -DRKV_WERROR=ON -DRKV_SANITIZE=$$(echo $$san | sed 's/none//') \
	    $$([ $$san != none ] || echo $(BINDINGS)) >/dev/null && \
	  $(BIN)/cmake --build $$dir && $(BIN)/ctest --test-dir $$dir --output-on-failure || exit 1; \
	done

stubs: setup  ## regenerate the type stub of the extension
	$(BIN)/pybind11-stubgen rdma_kv_cache._native -o src --exit-code

bench-engine: bench-peers  ## the native engine beside memcpy, raw TCP and NIXL
	$(BIN)/python tests/bench/bench_engine.py

bench-pd: bench-peers  ## time to first token: one engine, vLLM's NixlConnector, ours
	$(BIN)/python tests/bench/bench_pd.py

bench-gpu:  ## the same on a GPU, Llama 3 8B's shape: PYTHON= has vLLM for CUDA, ARGS= see --help
	$(PYTHON) tests/bench/bench_gpu.py $(ARGS)

bench-gpu-engine:  ## cuda_ipc between two processes on a GPU beside a plain copy
	$(PYTHON) tests/bench/bench_gpu_engine.py $(ARGS)

gpu:  ## tests on a real GPU, with $(PYTHON)'s vLLM for CUDA
	$(PYTHON) -m pytest -m gpu

bench-verbs: bench-peers bench-programs  ## the verbs engine beside perftest, NIXL and Mooncake, in a Soft-RoCE guest
	$(BIN)/python -m tests.guest -m 3000 -t 3000 -- \
	  env PYTHONUNBUFFERED=1 PYTHONPATH=$(abspath build/mooncake) $(abspath $(BIN))/python \
	  tests/bench/bench_verbs.py --native $(abspath build/bench/bench/rkv_verbs_bench)

bench-posting: bench-programs  ## nanoseconds a descriptor up to a null NIC, and Python's share
	$(BIN)/python tests/bench/bench_posting.py build/bench/bench/rkv_posting_bench

faults-verbs: setup  ## every fault 20 times in Soft-RoCE guests, with a table (about 40 minutes)
	$(BIN)/python -m tests.verbs.faults --runs 20

cycles-verbs: setup  ## 10,000 connect, transfer, close cycles in a guest: memory must stay flat
	$(BIN)/python -m tests.verbs.cycles --cycles 10000

e2e-verbs: setup  ## the whole product over verbs in a User-Mode Linux guest (about 10 minutes)
	tests/guest/build_uml.sh
	$(BIN)/python -m pytest -m 'e2e and verbs'

.PHONY: bench-programs
bench-programs: setup
	@$(BIN)/cmake -S native -B build/bench -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DRKV_BUILD_BENCH=ON >/dev/null && $(BIN)/cmake --build build/bench

.PHONY: bench-peers
bench-peers: setup
	@$(BIN)/pip show -q nixl 2>/dev/null || $(BIN)/pip install -q --no-deps -r env/bench.txt
	@# Beside the venv: it brings libraries of its own.
	@[ -d build/mooncake ] || $(BIN)/pip install -q --no-deps -t build/mooncake -r env/bench-mooncake.txt

clean:  ## remove what was built (not .venv, not the model)
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache
