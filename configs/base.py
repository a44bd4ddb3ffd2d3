"""Every option once, with its unit and default. An experiment is a diff from this.

Lists are comma-separated strings; where a list names features or their values, it may also read
a JSON file: "@FILE:key" or "@FILE:key[:n]" for its first n. "{workdir}" in a string stands for
the run's working directory.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults, locked: an unknown field is an error."""
    config = ConfigDict()
    config.experiment_name = ""  # stands in summary.json
    # Models: a Hugging Face directory, a Hugging Face repo id, or a converted directory.
    config.policy_model = ""
    config.sarm_model = ""
    config.dtype = "float32"  # of the frozen weights and activations: float32 or bfloat16
    config.remat = "dots"  # kept for the backward pass: all (none), matrix products, nothing (full)
    config.prompts_jsonl = ""  # {"prompt"} lines that PPO trains on
    config.eval_prompts_jsonl = ""  # {"prompt"} lines to evaluate the policy on; empty: none
    # Tokens, at most the positions that the SARM knows; longer conversations lose their beginning
    config.sarm_max_length = 4096
    config.sarm_batch_size = 16  # conversations scored at a time

    # Devices along each axis: data copies the weights, fsdp splits them, either splits the batch;
    # tensor splits heads and widths.
    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    # Several runs of PPO, trained in {workdir}/experiments/NAME: NAME = ConfigDict() of what it
    # changes in this config. None: one run, in {workdir}.
    config.experiments = ConfigDict()

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0  # the update is scaled by alpha / rank
    # Recorded in adapter_config.json. PPO compares log-probabilities, so all of its forward
    # passes run without dropout, whatever stands here.
    config.lora.dropout = 0.0
    config.lora.target_modules = "q_proj,k_proj,v_proj,o_proj"

    config.ppo = ConfigDict()
    config.ppo.total_steps = 100
    config.ppo.batch_size = 8  # responses per step, over all devices
    config.ppo.num_minibatches = 1  # optimizer steps per epoch
    config.ppo.gradient_accumulation_steps = 1  # microbatches per minibatch: memory, not maths
    config.ppo.ppo_epochs = 2
    config.ppo.learning_rate = 1e-4
    config.ppo.lr_schedule = "constant"  # constant, linear or cosine to 0
    config.ppo.warmup_steps = 0  # PPO steps of linear warm-up
    config.ppo.weight_decay = 0.0
    config.ppo.max_grad_norm = 1.0
    config.ppo.clip_range = 0.2
    config.ppo.value_clip_range = 0.2
    config.ppo.vf_coef = 0.1
    config.ppo.gamma = 1.0
    config.ppo.gae_lambda = 0.95
    config.ppo.kl_coef = 0.05  # per-token penalty on log π_old − log π_ref, in reward σ per nat
    config.ppo.missing_eos_penalty = 1.0  # in reward σ, for a response that does not end; 0: none
    config.ppo.whiten_advantages = True
    config.ppo.temperature = 1.0  # of sampler, old, new and reference policy alike
    config.ppo.top_p = 1.0  # PPO refuses anything else
    config.ppo.max_new_tokens = 256
    config.ppo.max_prompt_tokens = 1024  # with the chat template
    # A longer prompt: error, drop it, or truncate the beginning of the user's text.
    config.ppo.long_prompts = "error"
    config.ppo.calibration_batches = 2  # batches of reference responses that give μ and σ
    config.ppo.pack_levels = 0  # sizes of packed batches (ppo/slots.py), each compiled; 0 = padded
    config.ppo.logprob_chunk = 0  # response positions per vocabulary projection; 0 = all at once
    config.ppo.checkpoint_every = 10  # steps
    config.ppo.keep_checkpoints = 3
    config.ppo.samples_per_step = 2  # rows of samples.jsonl per step
    config.ppo.eval_every = 10  # steps between evaluations on eval_prompts_jsonl
    config.ppo.eval_batches = 1  # batches of its prompts, the same ones every time
    config.ppo.seed = 0

    config.reward = ConfigDict()
    config.reward.penalize_features = ""
    config.reward.tau_values = ""  # threshold on z, one per penalised feature
    config.reward.alpha_values = ""  # penalty for z > tau, one per penalised feature
    config.reward.clamp_features = ""
    config.reward.clamp_set_values = ""  # one per clamped feature; "none" leaves one out
    config.reward.clamp_min_values = ""
    config.reward.clamp_max_values = ""
    config.reward.beta = 0.0  # weight of the latent KL to human responses
    config.reward.latent_indices = ""  # features the discriminator reads; empty: all in the buffer
    config.reward.human_latents = ""  # safetensors written by --stage=human_latents
    config.reward.unit = "score"  # of alpha and beta: reward-model score, or "sd" of it
    # The most that penalties and latent KL together take from a response, in sd of the score.
    config.reward.penalty_cap = 10.0  # inf: no cap

    config.discriminator = ConfigDict()
    config.discriminator.learning_rate = 1e-3
    config.discriminator.hidden_size = 64
    config.discriminator.steps = 4  # minibatches per PPO step
    config.discriminator.batch_size = 32  # human rows, and as many policy rows
    config.discriminator.weight_decay = 1e-2

    # The next two sections change no number: a run may go on with others than it started with.
    config.checkpoint = ConfigDict()
    config.checkpoint.keep_every = 0  # besides the newest, those of every n-th step for good

    # Warnings in the log and in summary.json where a metric says that a run has gone wrong
    # (ppo/tracking/guards.py); thresholds are on the columns of metrics.csv.
    config.guards = ConfigDict()
    config.guards.stop = ""  # comma-separated guards that also end the run, exit 3; "all" of them
    config.guards.steps = 3  # in a row, before a guard warns
    config.guards.max_nonfinite_steps = 3  # whose updates were skipped; one more ends the run
    config.guards.ratio_0_max_dev = 1e-5  # warns above, on the first step
    config.guards.ref_kl = 15.0  # nats per response, and
    config.guards.ref_kl_per_token = 0.1  # nats per response token: warns above both
    config.guards.approx_kl = 0.1  # nats per token, mean over updates (first: 0); warns above
    config.guards.disc_acc = 0.97  # warns above
    config.guards.entropy = 0.02  # nats per token; warns below
    config.guards.distinct_responses = 0.3  # per distinct prompt of a batch; warns below
    config.guards.eos_fraction = 0.05  # warns below
    config.guards.alpha_low = 0.1  # warns for penalties outside, in sd of the score
    config.guards.alpha_high = 10.0

    # A profiler trace of some PPO steps; choose late ones, after everything is compiled.
    config.profile = ConfigDict()
    config.profile.start_step = -1  # -1: none
    config.profile.num_steps = 2

    config.human_latents = ConfigDict()
    config.human_latents.demos_jsonl = ""  # {"prompt", "response"} lines written by people

    # Stage prepare_data: preference pairs from demonstrations and the policy's own answers; the
    # whole of a small world with its models; or prompts, demos, probes and tests from benchmarks.
    config.prepare_data = ConfigDict()
    config.prepare_data.source = "demonstrations"  # or lab, benchmarks
    config.prepare_data.demos_jsonl = ""  # {"prompt", "response"} lines
    config.prepare_data.samples_per_prompt = 2
    config.prepare_data.max_new_tokens = 64
    config.prepare_data.temperature = 0.8
    config.prepare_data.seed = 0
    # Of benchmarks: files, comma-separated, or hf://datasets/OWNER/NAME/PATH. A path may be empty.
    config.prepare_data.steering_dir = ""  # the SARM repository's steering/: train/*/, test/*/
    config.prepare_data.rewardbench2 = ""  # parquet, JSON or JSON Lines
    config.prepare_data.rm_bench = ""  # JSON or JSON Lines
    config.prepare_data.safety_pairs = ""  # own {"prompt", "chosen", "rejected"}: what to find
    config.prepare_data.complement_pairs = ""  # likewise: everything else
    # Of the prompts, into test sets; steering_dir has its own.
    config.prepare_data.held_out_fraction = 0.0

    # Stage train_sarm: a SARM on the first layers of policy_model.
    config.train_sarm = ConfigDict()
    config.train_sarm.model = ""  # the trunk is cut from; empty: policy_model
    config.train_sarm.pairs_jsonl = ""  # {"prompt", "chosen", "rejected"}; comma-separated files
    config.train_sarm.held_out_fraction = 0.2  # of the prompts
    config.train_sarm.max_length = 4096  # tokens
    config.train_sarm.source_layer = 16
    config.train_sarm.latent_size = 65536
    config.train_sarm.k = 192
    config.train_sarm.use_topk = True  # False: the head reads the pre-activations
    config.train_sarm.mode = 3  # 0 head; 1 trunk + head; 2 all, both losses; 3 = 1 + detached SAE
    config.train_sarm.reconstruction_weight = 1.0
    config.train_sarm.sae_tokens = 100_000  # activations collected, at most
    config.train_sarm.sae_steps = 1000
    config.train_sarm.sae_batch_tokens = 512
    config.train_sarm.sae_learning_rate = 1e-3
    config.train_sarm.dead_after_steps = 100  # without firing
    config.train_sarm.aux_k = 256  # dead latents that reconstruct the residual
    config.train_sarm.aux_weight = 1 / 32
    config.train_sarm.epochs = 3
    config.train_sarm.batch_size = 16  # pairs
    config.train_sarm.learning_rate = 2e-6
    config.train_sarm.head_learning_rate = 1e-3
    config.train_sarm.weight_decay = 1e-3
    config.train_sarm.warmup_fraction = 0.03
    config.train_sarm.seed = 0

    # Stage identify: which latents tell chosen from rejected.
    config.identify = ConfigDict()
    config.identify.pairs_jsonl = ""  # comma-separated files
    # Pairs of a concise (chosen) and a longer answer, for the list verbosity_features; empty: none
    config.identify.verbosity_jsonl = ""
    config.identify.top_k = 10  # features per list
    config.identify.method = "differential"  # or head_weight
    config.identify.tau_quantile = 0.98  # of z on chosen responses
    config.identify.false_alarm_budget = 0.05  # share of chosen responses that detectors may hit
    config.identify.combine = "pooled"  # lists follow all pairs; "sources": their sources' mean
    config.identify.resamples = 1000  # of the bootstrap
    config.identify.examples = 5  # responses shown per feature
    config.identify.naming_examples = 10  # responses per prompt of naming_prompts.jsonl; 0: no file
    config.identify.seed = 0  # of everything in this stage that is drawn at random

    # Stage probe: what the reward does when a feature is set to a value, or kept within bounds.
    config.probe = ConfigDict()
    config.probe.feature = ""  # one id, or a list; every feature is probed on its own
    config.probe.set_value = placeholder(float)  # None: 0.0 unless a bound is given
    config.probe.min_value = placeholder(float)  # z is raised to it; None: no lower bound
    config.probe.max_value = placeholder(float)  # z is lowered to it; None: no upper bound
    config.probe.data_jsonl = ""  # {"prompt", "response"} or pairs; {"prompt", "candidates"}
    config.probe.mode = "pairs"  # or bestofn
    config.probe.rank = 1  # of the candidate that bestofn selects; 1: the best
    config.probe.controls = 10  # random features per feature, alike in firing rate and activation
    config.probe.flips = 9999  # of signs, in the test of a certificate
    config.probe.level = 0.05  # of a certificate, after Holm's correction
    config.probe.seed = 0  # of controls and flips

    # Stage evaluate: the SARM on benchmarks and under steering, without and with its controls: the
    # clamped and penalised features of reward, and steering_json. Comma-separated files.
    config.evaluate = ConfigDict()
    config.evaluate.steering_json = ""  # {"48659": ["*", 0.0], "7": ["+", 1.5]}
    # {"question", "answer", "type"}, scored before and after: FILE or NAME=FILE. Each type of each
    # file is a set; files that are given the same name count as one.
    config.evaluate.data_jsonl = ""
    config.evaluate.num_example = 0  # answers of each set; 0: all
    config.evaluate.steering_targets = ""  # types or sets meant to change; empty: rejected, if any
    config.evaluate.resamples = 2000  # of the bootstrap for specificity
    config.evaluate.seed = 0  # of num_example and the bootstrap
    config.evaluate.rm_bench = ""  # as in prepare_data
    config.evaluate.rewardbench2 = ""
    # The base against trained adapters, up to ppo.max_new_tokens per response.
    config.evaluate.prompts_jsonl = ""  # {"prompt"} lines; empty: eval_prompts_jsonl
    config.evaluate.runs = ""  # PPO's, DIR or NAME=DIR, comma-separated; empty: this one's adapter
    config.evaluate.human_jsonl = ""  # {"prompt", "response"} lines shown in latent_map.json
    config.evaluate.temperature = 0.0  # 0: greedy
    config.evaluate.samples = 1  # responses per prompt
    config.evaluate.batch_size = 32  # responses sampled at a time

    # Stage plan: compiles every program of a PPO step from shapes alone, and says what it takes.
    config.plan = ConfigDict()
    config.plan.target = "host"  # or h100x4, h200x8 and the like, which need not be there
    config.plan.policy_config = ""  # a folder with a config.json; empty: policy_model
    config.plan.sarm_config = ""  # likewise; empty: sarm_model
    # A JSON file {"tokens": prompts of that length with the chat template, …}: the plan is then for
    # the lengths that a run would pad its batches to. Empty: all prompts at ppo.max_prompt_tokens.
    config.plan.prompt_lengths = ""
    config.plan.search = False  # over meshes of the target's devices, remat and accumulation

    # Stage report: a page on one run, or on several side by side.
    config.report = ConfigDict()
    # Comma-separated working directories, DIR or NAME=DIR, or metrics, FILE.csv; empty: its own.
    config.report.runs = ""
    config.report.samples = 200  # prompts of each run in its browser of responses; 0: all

    # The reward-hacking lab: a small world whose true reward is known (sarm_jax/lab).
    config.lab = ConfigDict()
    config.lab.held_out_fraction = 0.2  # of the country combinations
    config.lab.corpus_rows = 40_000  # responses with notes that the pretrained model reads
    config.lab.demonstrations = 4_000
    config.lab.pairs = 20_000  # of the biased annotator
    config.lab.contrast_pairs = 1024  # with and without flattery
    config.lab.tap_layer = 2  # where pretraining also takes the loss: the SARM's source_layer
    config.lab.pretraining_steps = 2750
    config.lab.pretraining_learning_rate = 3e-3
    config.lab.tuning_steps = 200
    config.lab.tuning_learning_rate = 1e-3
    config.lab.batch_size = 64  # rows
    config.lab.seed = 0  # of a single stage; the study takes it from seeds
    # The study, --stage=all: every seed under every condition (sarm_jax/lab/conditions.py).
    config.lab.seeds = "0"  # comma-separated, ranges such as 10-19
    config.lab.conditions = "baseline,full"
    config.lab.processes = 1  # seeds that run at a time
    config.lab.alpha = 2.0  # penalty per detector that fires, in reward.unit
    config.lab.beta = 0.1  # of the latent KL on the carriers, in reward.unit
    config.lab.gates_json = ""  # written by identify; PPO refuses to start where a gate failed
    config.lab.ignore_failed_gates = False  # True: it starts and says so

    return config.lock()
