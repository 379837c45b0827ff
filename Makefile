PYTHON ?= python3
VENV := .venv
# Where `make models` finds training data, and which size of encoder it trains: cpu or gpu.
DATA ?= ../shared/data
SIZE ?= cpu
BIN := $(VENV)/bin
# The pinned CPU build of torch satisfies every dependency; GPU users install another torch first (see README).
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint models bench bench-invariance clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	$(PIP) --editable '.[train,eval]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) 'pesq>=0.0.4' || echo 'pesq needs a C compiler: its tests are skipped'
	$(PIP) --no-deps --upgrade --target $(VENV)/oracles sylber==0.1.4  # pins versions; tests read one of its files
	touch $@

demo: $(VENV)/.installed
	$(BIN)/speechtok tokenize assets/clips --out demo/units --overwrite
	$(BIN)/speechtok show assets/clips/librispeech-1688-142285-0004.flac --out demo/units.png --seconds 4
	@echo "Parquet: demo/units/part-00000.parquet   picture: demo/units.png"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=term

# ENCODER=RUN/encoder takes an encoder that was trained elsewhere, SYLBER_ENCODER one of syllables, MERT_ENCODER one of
# music, CODEC=RUN/codec a codec; the rest follows.
models: $(VENV)/.installed-train
	$(BIN)/speechtok train models --data $(DATA) --size $(SIZE) $(if $(ENCODER),--encoder $(ENCODER)) \
		$(if $(SYLBER_ENCODER),--sylber-encoder $(SYLBER_ENCODER)) $(if $(CODEC),--codec $(CODEC)) \
		$(if $(MERT_ENCODER),--mert-encoder $(MERT_ENCODER))

# Tables of the shipped tokenizers (evaluate units, evaluate abx) are refreshed by `make models`.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m speechtok.benchmarks.equivalence --data $(DATA)/speech/eval --json benchmarks/results/equivalence.json
	$(BIN)/python -m speechtok.benchmarks.streaming --data $(DATA)/speech/eval --json benchmarks/results/streaming.json
	$(BIN)/python -m speechtok.benchmarks.early_exit --repeats 7 --json benchmarks/results/early_exit.json
	NUMBA_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m speechtok.benchmarks.segmentation --json benchmarks/results/segmentation.json
	$(BIN)/python -m speechtok.benchmarks.cqt --json benchmarks/results/cqt.json
	$(BIN)/python -m speechtok.benchmarks.residual --json benchmarks/results/residual.json
	NUMBA_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m speechtok.benchmarks.lipcot --repeats 7 --data $(DATA)/speech/train --json benchmarks/results/lipcot.json
	$(PIP) --no-deps sktime==1.2.0  # one of its data sets is read, and nothing imported
	NUMBA_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m speechtok.benchmarks.lipcot_probe --data $(DATA) --json benchmarks/results/lipcot_probe.json

# Rows of one vocabulary under augmentation; ROWS="NAME LABEL=FOLDER ..." names others than the default ones. What the
# program measured before stays in runs/invariance.
bench-invariance: $(VENV)/.installed-dev
	$(BIN)/python -m speechtok.benchmarks.invariance --data $(DATA) $(foreach row,$(ROWS),--tokenizer $(row)) \
		--json benchmarks/results/invariance.json

clean:
	rm -rf $(VENV) demo build *.egg-info
