# make setup   .venv with the locked requirements
# make demo    prepare the embedded corpus, train three arms with three seeds, compare, probe, sample
# make bench   every bench, in less than 15 minutes on two idle cores; writes results/ (RESULTS=out/results: there).
#              NANOGPT_DIR=../nanoGPT: a checkout to measure against; HF_TOKENIZER=gpt2: a folder of its transformers tokenizer;
#              TEXT=text.jsonl.xz: JSON lines (else Python's docstrings)
# make test    lint and tests
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
OUT ?= out/demo
RESULTS ?= results
TEXT ?= out/bench/text.jsonl
NANOGPT := $(if $(NANOGPT_DIR),--nanogpt-dir=$(NANOGPT_DIR))
HF := $(if $(HF_TOKENIZER),--hf-tokenizer=$(HF_TOKENIZER))

.PHONY: setup demo bench test lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python %d.%d is too old, 3.10 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked requirements into $(VENV) (a few minutes the first time)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-eval.txt
	@echo "installing what the tests need"
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps -r requirements-eval.txt
	@touch $@

demo: setup
	@$(RUN) data/pydocs/prepare.py
	@$(RUN) scripts/matched.py config/demo.py --out=$(OUT)
	@$(RUN) scripts/probes/spelling.py --runs $(OUT)
	@for arm in bpe_tied bpe_untied kronecker; do \
	  echo; echo "--- a sample of $$arm, seed 1337"; \
	  $(RUN) sample.py --out_dir=$(OUT)/$${arm}_s1337 --start="Return a new" --num_samples=1 --max_new_tokens=60 || exit 1; \
	done
	@echo; $(RUN) scripts/compare.py $(OUT)

bench: $(VENV)/.installed-dev $(TEXT)
	@failed=; \
	run() { echo; echo "--- $$*"; began=$$(date +%s); $(RUN) "$$@" || failed="$$failed $$1"; echo "$$1: $$(($$(date +%s) - began)) s"; }; \
	run scripts/bench/embedding.py --text $(TEXT) --threads 1 --rounds 3 $(HF) --out $(RESULTS)/embedding; \
	run scripts/bench/train.py --arms=bpe_untied,kronecker --steps=6 --shares $(NANOGPT) --out=$(RESULTS)/training; \
	run scripts/bench/sample.py $(NANOGPT) --out=$(RESULTS)/training; \
	run scripts/bench/scale.py --rounds=2 --out=$(RESULTS)/training; \
	run scripts/bench/prepare.py --input $(TEXT) --out $(RESULTS)/data; \
	run scripts/bench/loader.py --out $(RESULTS)/data; \
	test -z "$$failed" || { echo "error: not measured:$$failed"; exit 1; }

out/bench/text.jsonl: setup
	@mkdir -p $(@D)
	@$(RUN) -c 'import json; from data.pydocs.prepare import collect; [print(json.dumps({"text": t})) for t in collect()[0]]' > $@.part
	@mv $@.part $@

test: lint
	@$(RUN) -m pytest -n 2

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

# the environment alone: trainings in out/ are nobody's rubbish
clean:
	rm -rf $(VENV)
