# What to run. `make` lists the targets; `make demo` and `make test` are the first two of the README.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint fmt clippy unit alerts deny cuda-check cuda cuda-kernels gpu-test bench bench-gpu bench-small bench-periods bench-daemon bench-run bench-precision parity forgetting streams clean

CARGO ?= cargo
STEP := tools/step.sh
TARGET := $(or $(CARGO_TARGET_DIR),target)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## check for the C compiler, make, pkg-config and OpenSSL's headers; install them where apt-get and root allow it
	@tools/setup.sh

build: setup ## the release binary, target/release/palimpsest
	$(CARGO) build --release --locked

demo: build ## three periods of real frames through Kafka's protocol, three versions out, in a few minutes
	$(TARGET)/release/palimpsest demo

test: setup ## everything that CI runs: format, clippy, tests, a trial of the benchmarks, CUDA type check and kernels, alerts, licences
	@$(STEP) "format" $(CARGO) fmt --check
	@$(STEP) "clippy" $(CARGO) clippy --locked --all-targets -- -D warnings
	@$(STEP) "tests and doc tests" $(CARGO) test --locked
	@$(STEP) "a trial of every benchmark row" $(CARGO) test --locked --bench performance -- --small
	@$(STEP) "type check of the cuda feature" tools/cuda/check.sh
	@$(STEP) "CUDA kernels for sm_80 and sm_90" tools/cuda/kernels.sh --check
	@$(STEP) "alert rules" tools/promtool.sh
	@$(STEP) "licences, bans, sources" tools/deny.sh
	@echo "== all steps passed"

lint: fmt clippy deny ## format, clippy and cargo-deny alone

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

unit: ## unit tests alone
	$(CARGO) test --locked --lib

alerts: ## check and test the Prometheus rules with promtool
	tools/promtool.sh

deny: ## licences, bans and sources of the dependencies
	tools/deny.sh

cuda-check: ## type check with the cuda feature: no GPU, no toolkit
	tools/cuda/check.sh

cuda: setup ## a release binary with the cuda feature, target/cuda/release/palimpsest; fetches a CUDA toolkit, needs no GPU
	tools/cuda/build.sh

gpu-test: setup ## every operation on the first CUDA device against the CPU's; fails where there is none
	tools/cuda/gpu_test.sh

cuda-kernels: ## docs/kernels.md anew: what each CUDA kernel takes, for sm_80 and sm_90; fetches nvcc, needs no GPU
	tools/cuda/kernels.sh

bench: setup ## docs/performance.md anew, every row against its peers; BENCH="--rows vit_tiny --pairs 9", PYTHON=... if you like
	python=$$(tools/python.sh benches/peers/requirements.txt $(TARGET)/bench-python) && \
	$(CARGO) bench --locked --bench performance -- \
	  --python "$$python" --results $(abspath $(TARGET))/performance/results.json $(BENCH)

bench-gpu: setup ## the same page, training steps on the first CUDA device; needs a CUDA 13 toolkit and the peers' PyTorch for it
	python=$$(tools/python.sh benches/peers/requirements.txt $(TARGET)/bench-python) && \
	$(CARGO) bench --locked --features cuda --bench performance -- \
	  --gpu --threads 4 --python "$$python" --results $(abspath $(TARGET))/performance/gpu.json $(BENCH)

bench-small: setup ## a trial of every benchmark row: our side alone, small sizes, no Python
	$(CARGO) bench --locked --bench performance -- --small $(BENCH)

bench-periods: setup ## 50 equal periods through the daemon: is a late one as cheap as an early one? Writes docs/daemon_performance.md
	$(CARGO) bench --locked --bench daemon -- periods $(BENCH)

bench-daemon: setup ## ingest and embed without and with a training process beside them; BENCH=--small for a trial. Writes the same page
	$(CARGO) bench --locked --bench daemon -- training $(BENCH)

bench-run: setup streams ## one run of the forgetting benchmark beside PyTorch; writes docs/learning_performance.md
	python=$$(tools/python.sh benches/peers/requirements.txt $(TARGET)/bench-python) && \
	$(CARGO) bench --locked --bench performance -- forgetting-run \
	  --stream $(abspath $(TARGET))/streams/atari-digits-40 --python "$$python" $(BENCH)

bench-precision: setup streams ## the loss with products in bf16 and in f32, several seeds; writes the same page
	$(CARGO) bench --locked --bench performance -- precision --stream $(abspath $(TARGET))/streams/atari-digits-40 $(BENCH)

parity: setup streams ## 50 steps of lwf here and in PyTorch on the same views: losses and weights side by side; writes the same page
	python=$$(tools/python.sh benches/peers/requirements.txt $(TARGET)/bench-python) && \
	$(CARGO) bench --locked --bench performance -- parity \
	  --stream $(abspath $(TARGET))/streams/atari-digits-40 --python "$$python" $(BENCH)

forgetting: build streams ## docs/forgetting.md anew: what each method forgets, on every stream (hours on two cores); JOBS=2, BENCH="--seeds 1"
	tools/forgetting.sh $(TARGET) $(BENCH)

streams: ## the streams of the forgetting benchmark, in target/streams
	python=$$(tools/python.sh tools/streams/requirements.txt $(TARGET)/streams-python) && \
	fashion=$$(tools/streams/fashion.sh $(abspath $(TARGET))/streams-fashion) && \
	"$$python" tools/streams/atari_digits.py $(TARGET)/streams/atari-digits-40 && \
	"$$python" tools/streams/atari_digits.py $(TARGET)/streams/atari-digits-20 --games 20 && \
	"$$python" tools/streams/five_periods.py $(TARGET)/streams/five-periods --fashion "$$fashion" && \
	"$$python" tools/streams/fashion_split.py $(TARGET)/streams/fashion-split --fashion "$$fashion" && \
	"$$python" tools/streams/near_duplicates.py $(TARGET)/streams/near-duplicates

clean: ## remove what was built
	$(CARGO) clean
	rm -rf palimpsest-demo
