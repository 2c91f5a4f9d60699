# make demo      install into .venv and complete a few prompts in every mode
# make test      the same set-up with the test extra, then the tests
# make test-quick   the same without what takes long: tests marked slow, and tests marked interpreted, which run kernels in
#                Triton's interpreter
# make lint      ruff check and format check, mypy
# make bench     what makes sense on a CPU: the reference's operations one by one (bench/ops.py, pytest-benchmark), then the
#                modes side by side (bench/decode.py), whose options are ARGS="..."
# make compile-report   compile every kernel for real GPUs, without one: registers, memory, spills, instructions, seconds
# make test-gpu  whole generations and the kernels' tests on a GPU, with the Python that has torch for it: PYTHON=python3,
#                nothing is installed; without those of kernels/compiled/, which runs on CPUs alone
# make bench-gpu the kernels beside their peers on a GPU, likewise, into bench/results/: what has a goal first, then what
#                there is time for, no case after 7 minutes; ARGS="--full --budget inf" for all shapes, however long
# make profile   a step's kernels: their times beside the bytes that they must move, and a timeline, trace.json;
#                ARGS="..." are options of profiling/torch_trace.py. Nsight's scripts: profiling/README.md
# make profile-gpu  the same of the Triton kernels on a GPU, with the Python that has torch for it
# make paper     the paper's tables and figures, and acceptance by rule; ARGS="..." are options of both scripts:
#                --update-readme writes bench/README.md, --target T --draft D --ngram N --prompts FILE take other models
# make paper-gpu the paper from nothing, with the Python that has torch for the GPU: trains target, draft and n-gram table,
#                tunes trees, measures and draws, in 28 minutes; the same command goes on after an interruption. Without a GPU
#                the embedded models' sizes. ARGS="--out FOLDER --minutes 28 --prompts HumanEval.jsonl.gz"
# make clean     remove .venv and everything built
#
# VENV=folder chooses another virtual environment, PYTHON=python3.12 another interpreter, ARGS="..." are passed on.
# Without CUDA, set PIP_EXTRA_INDEX_URL to an index of CPU builds of torch to spare the download of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin

.PHONY: demo test test-quick lint bench paper compile-report test-gpu bench-gpu paper-gpu profile profile-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/stagedspec demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 -m "not slow and not interpreted" $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --python-executable $(BIN)/python

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest bench/ops.py --quiet --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname
	$(BIN)/python bench/decode.py $(ARGS)

paper: $(VENV)/.installed
	$(BIN)/python bench/paper.py $(ARGS)
	$(BIN)/python bench/acceptance.py $(ARGS)

compile-report: $(VENV)/.installed
	$(BIN)/python profiling/compile_report.py $(ARGS)

profile: $(VENV)/.installed
	$(BIN)/python profiling/torch_trace.py $(ARGS)

# A GPU machine's own Python has the torch and triton that fit its driver. The package is put beside it, not installed.
GPU_PATH = build/gpu
GPU_PYTHON = PYTHONPATH=$(CURDIR)/$(GPU_PATH) $(PYTHON)

$(GPU_PATH): $(shell find kernels stagedspec -type f ! -path '*/__pycache__/*')
	rm -rf $@ && mkdir -p $@ && cp -r stagedspec $@/ && cp -r kernels $@/stagedspec/kernels

GPU_TESTS = $(addprefix decoding/test_,decoder.py inputs.py warm_up.py torch_state.py invalid_logits.py) hf/test_hf.py \
	check kernels profiling/test_compile_report.py

test-gpu: $(GPU_PATH)
	cd $(GPU_PATH) && $(GPU_PYTHON) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
		--numprocesses auto --maxprocesses 8 --dist worksteal \
		-k "not torch-cpu" --ignore-glob '/**/test_compiled*' $(addprefix $(CURDIR)/tests/,$(GPU_TESTS)) $(ARGS)

bench-gpu: $(GPU_PATH)
	cd $(GPU_PATH) && $(GPU_PYTHON) $(CURDIR)/bench/kernels/run.py $(ARGS)

# Where PYTHON has no torch, the one of `make demo`.
paper-gpu: $(GPU_PATH)
	@$(PYTHON) -c 'import torch, transformers' 2>/dev/null || $(MAKE) $(VENV)/.installed
	@python=$$($(PYTHON) -c 'import sys, torch, transformers; print(sys.executable)' 2>/dev/null || echo $(BIN)/python); \
		PYTHONPATH=$(CURDIR)/$(GPU_PATH) $$python bench/paper_gpu.py --out bench/results/paper-gpu $(ARGS)

profile-gpu: $(GPU_PATH)
	cd $(GPU_PATH) && $(GPU_PYTHON) $(CURDIR)/profiling/torch_trace.py --backend triton --out $(CURDIR)/trace.json $(ARGS)

# The interpreter, from a system without ensurepip too (Debian's python3 without python3-venv).
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } || \
		{ rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; install its venv and pip modules" \
		  "(Debian, Ubuntu: apt install python3-venv python3-pip) and run make again" >&2; exit 1; }

# Stamps: a second run installs again only after one of these files has changed. The install is editable.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf .venv build dist stagedspec.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
