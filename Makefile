# make quickstart    train, ablate and show a small bilingual model: under ten minutes on two cores
# make quick         lint, and two cases of every test of tests/unit, kernels and parity, which start no process
# make test          run all tests, many of them real trainings of several processes
# make mutants       make every fault of tests/mutations, one at a time, and print those that no test notices
# make aot           compile every kernel ahead of time for sm_80, 90 and 100 (make test: sm_90 in half precision)
# make cluster-test  SLURM, torchrun on two hosts and deepspeed over ssh, in namespaces of this machine; as root
# make fault-campaign  200 faults at random moments of runs; resumed, each must end as if left alone
# make gpu           checks and timings on a GPU, with PYTHON, within nine minutes; GPU_ARGS="--budget 300"
# All but `make gpu` make the virtual environment .venv on first use; PYTHON=... chooses the interpreter (3.10 to 3.12).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install quickstart quick test mutants aot cluster-test fault-campaign gpu lint clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo not found); SGTM needs Python 3.10 to 3.12:" \
		     "make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

# With one thread, which loses little on so small a model, and nothing where other programs keep the cores busy.
quickstart: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/sgtm quickstart

# For the tests of exports: transformers 4 in a folder of its own, with what it needs of other versions.
FOUR := .venv/transformers-4

$(FOUR)/.installed: tests/transformers-4.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(FOUR) -r tests/transformers-4.txt
	touch $@

# For the test of examples/lm_eval: EleutherAI's lm-eval in a folder of its own, as nothing else needs what it imports.
LM_EVAL := .venv/lm-eval

$(LM_EVAL)/.installed: tests/lm-eval.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(LM_EVAL) -r tests/lm-eval.txt
	touch $@

# For the tests of sgtm/integrations/torchtitan.py: torchtitan in a folder of its own, which has none for Python 3.10.
TITAN := .venv/torchtitan

$(TITAN)/.installed: tests/torchtitan.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(TITAN) -r tests/torchtitan.txt
	touch $@

# Three processes for two cores: tests use one thread each, and some wait. What one has not begun, another takes.
PYTEST_ARGS ?= -n 3 --dist worksteal

test: install $(FOUR)/.installed $(LM_EVAL)/.installed $(TITAN)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quick: lint
	$(BIN)/python -m pytest --quick -q $(PYTEST_ARGS) tests/unit tests/kernels tests/parity

aot: install
	$(BIN)/python -m sgtm_kernels.tools.aot $(AOT_ARGS)

mutants: install $(TITAN)/.installed
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

cluster-test: install
	$(BIN)/python -m pytest tests/cluster

fault-campaign: install
	$(BIN)/python tests/faults/campaign.py $(CAMPAIGN_ARGS)

gpu:
	$(PYTHON) benchmarks/gpu.py --out gpu-run $(GPU_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell sgtm kernels benchmarks docs examples launch *.md
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
