"""Every option once, with its unit and its default. An experiment is a diff from this file.

The comment above or behind an option documents it; the comment above a section documents the
section. Lists are comma-separated strings. A list of features, or of values for features, may also
come from a JSON file: "@FILE:key" is the list under that key, "@FILE:key[:n]" its first n entries.
"{workdir}" in a string stands for the run's working directory.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults, locked: an unknown field is an error."""
    config = ConfigDict()
    _add_models(config)
    _add_ppo(config)
    _add_reward(config)
    _add_guards(config)
    _add_profile(config)
    _add_human_latents(config)
    _add_prepare_data(config)
    _add_train_sarm(config)
    _add_train_sae(config)
    _add_identify(config)
    _add_train_probe(config)
    _add_probe(config)
    _add_evaluate(config)
    _add_plan(config)
    _add_report(config)
    _add_lab(config)
    _add_study(config)
    return config.lock()


def _add_models(config: ConfigDict) -> None:
    config.experiment_name = ""  # a name for the run, copied to summary.json
    # Chat model to train: a Hugging Face directory or repository id, or a converted directory.
    config.policy_model = ""
    # Reward model (SARM): a Hugging Face directory or repository id, or a converted directory.
    config.sarm_model = ""
    config.dtype = "float32"  # dtype of frozen weights and activations: float32 or bfloat16
    # Activations kept for the backward pass: all ("none"), matrix products ("dots"), none ("full").
    config.remat = "dots"
    # File of {"prompt"} rows that PPO trains on. A prompt is a text or a conversation, here and in
    # most files of demonstrations, pairs and probe data (docs/reference/files.md). Every file of
    # rows may be JSON Lines, a JSON array or Parquet, also compressed (.gz, .zst), or
    # hf://datasets/OWNER/NAME[/PATH].
    config.prompts_jsonl = ""
    # File of {"prompt"} rows that PPO evaluates the policy on; empty: no evaluation.
    config.eval_prompts_jsonl = ""
    # Longest conversation that the SARM scores, in tokens; a longer one loses its beginning. At
    # most the number of positions that the SARM has.
    config.sarm_max_length = 4096
    config.sarm_batch_size = 16  # conversations that the SARM scores at a time
    # Where PPO runs are shown while they train: any of tensorboard, wandb and trackio,
    # comma-separated; empty: nowhere. May differ when a run is resumed.
    config.track = "tensorboard"
    # Project of W&B and Trackio; with another one a run that is resumed starts a new run there.
    config.track_project = "sarm_jax"

    # Device mesh. The batch is split over the axes data and fsdp.
    config.mesh = ConfigDict()
    config.mesh.data = 1  # devices that each hold a copy of the weights
    config.mesh.fsdp = 1  # devices that the weights are split over, parameter by parameter
    config.mesh.tensor = 1  # devices that attention heads and hidden widths are split over

    # Several PPO runs from one config. Each entry NAME = ConfigDict() holds the options that its
    # run changes; the run is trained in {workdir}/experiments/NAME. Empty: one run, in {workdir}.
    config.experiments = ConfigDict()
    # Experiments that are trained at a time, over one copy of the models: their responses are
    # sampled together, which reads the weights once for all of them. Memory must hold the adapters,
    # optimizer states and KV caches of all. Numbers differ only by rounding.
    config.experiments_at_once = 1

    # LoRA adapters of the policy.
    config.lora = ConfigDict()
    config.lora.rank = 16  # rank of each adapter
    config.lora.alpha = 32.0  # the update is multiplied by alpha / rank
    # Dropout rate recorded in adapter_config.json. PPO itself runs without dropout, whatever the
    # value, because it compares log-probabilities of several forward passes.
    config.lora.dropout = 0.0
    config.lora.target_modules = "q_proj,k_proj,v_proj,o_proj"  # projections that have an adapter


def _add_ppo(config: ConfigDict) -> None:
    # PPO. Rewards are normalised: (R_total − μ) / σ with the mean μ and the standard deviation σ
    # of the scores of reference responses.
    config.ppo = ConfigDict()
    # ppo, with a value head; rloo or grpo, which compare responses to the same prompt instead.
    config.ppo.algorithm = "ppo"
    config.ppo.total_steps = 100  # PPO steps: rollout, scoring, updates
    config.ppo.batch_size = 8  # responses per PPO step, over all devices
    config.ppo.samples_per_prompt = 1  # responses to each prompt of a batch; rloo and grpo: ≥ 2
    config.ppo.num_minibatches = 1  # minibatches, and so optimizer steps, per epoch
    # Microbatches per minibatch. More of them need less memory; the gradient is the same.
    config.ppo.gradient_accumulation_steps = 1
    config.ppo.ppo_epochs = 2  # passes over each batch
    config.ppo.learning_rate = 1e-4  # peak learning rate of AdamW
    config.ppo.lr_schedule = "constant"  # constant, or linear or cosine decay to 0
    config.ppo.warmup_steps = 0  # PPO steps of linear warm-up
    config.ppo.weight_decay = 0.0  # weight decay of AdamW
    config.ppo.max_grad_norm = 1.0  # global norm that gradients are clipped to
    config.ppo.clip_range = 0.2  # ε: the policy ratio is clipped to [1 − ε, 1 + ε]
    # ε_high: the policy ratio is clipped to [1 − ε, 1 + ε_high] (DAPO, 2503.14476); 0: as ε.
    config.ppo.clip_range_high = 0.0
    config.ppo.value_clip_range = 0.2  # largest change of a value in the value loss, in reward σ
    config.ppo.vf_coef = 0.1  # weight of the value loss
    config.ppo.gamma = 1.0  # discount per token
    config.ppo.gae_lambda = 0.95  # λ of generalised advantage estimation
    # Penalty on the KL to the reference, in reward σ per nat. ppo: on log π_old − log π_ref of each
    # token; rloo: on their sum over a response; grpo: weight of the k3 estimate in the loss.
    config.ppo.kl_coef = 0.05
    # Penalty for a response without a stop token, in reward σ; 0: a response need not end.
    config.ppo.missing_eos_penalty = 1.0
    config.ppo.whiten_advantages = True  # True: advantages have mean 0 and variance 1 in a batch
    # grpo. True: a group's advantages are divided by its standard deviation (2402.03300); False:
    # they are not (Dr. GRPO, 2503.20783).
    config.ppo.scale_advantages = True
    # grpo. The loss is averaged over all tokens of a minibatch ("tokens": DAPO, 2503.14476), over
    # the tokens of each response and then over the responses ("responses": 2402.03300), or over
    # the responses after dividing their sums by max_new_tokens ("constant": Dr. GRPO, 2503.20783).
    config.ppo.loss_average = "tokens"
    # Sampling temperature; old, new and reference log-probabilities use the same one.
    config.ppo.temperature = 1.0
    config.ppo.top_p = 1.0  # nucleus sampling; PPO accepts 1.0 only
    # Responses that are sampled at a time; one that ends makes room for the next (fewer rows, less
    # memory, no idle rows). 0: all responses of a batch at once.
    config.ppo.rollout_slots = 0
    config.ppo.max_new_tokens = 256  # longest response, in tokens
    config.ppo.max_prompt_tokens = 1024  # longest prompt with the chat template, in tokens
    # For a longer prompt: error, drop the prompt, or truncate its beginning: the oldest turns of a
    # conversation after the system turn, then the beginning of the user's text.
    config.ppo.long_prompts = "error"
    config.ppo.calibration_batches = 2  # batches of reference responses that μ and σ come from
    # Number of sizes of packed batches (ppo/slots.py), each compiled once; 0: padded batches. In a
    # packed batch the responses to a prompt share its computation, as far as they are in the same
    # microbatch on the same device.
    config.ppo.pack_levels = 0
    # Response positions per projection onto the vocabulary; 0: all positions at once.
    config.ppo.logprob_chunk = 0
    config.ppo.checkpoint_every = 10  # PPO steps between checkpoints
    config.ppo.keep_checkpoints = 3  # newest checkpoints that are kept
    config.ppo.samples_per_step = 2  # rows of samples.jsonl per PPO step
    config.ppo.eval_every = 10  # PPO steps between evaluations on eval_prompts_jsonl
    config.ppo.eval_batches = 1  # batches per evaluation; every evaluation has the same prompts
    config.ppo.seed = 0  # seed of prompt order, sampling, adapters and discriminator


def _add_reward(config: ConfigDict) -> None:
    # The compound reward: score of the SARM − penalties − latent KL.
    config.reward = ConfigDict()
    config.reward.penalize_features = ""  # features with a penalty
    config.reward.tau_values = ""  # τ: a penalty applies if z > τ; one per penalised feature
    config.reward.alpha_values = ""  # α: the penalty, in `unit`; one per penalised feature
    config.reward.clamp_features = ""  # features whose latent is changed before the head reads it
    # Value that the latent is set to, one per clamped feature; "none": not set.
    config.reward.clamp_set_values = ""
    # Lower bound of the latent, one per clamped feature; "none": no bound.
    config.reward.clamp_min_values = ""
    # Upper bound of the latent, one per clamped feature; "none": no bound.
    config.reward.clamp_max_values = ""
    config.reward.beta = 0.0  # β: weight of the latent KL to human responses, in `unit` per nat
    # Features that the discriminator reads; empty: all features in the file of human latents.
    config.reward.latent_indices = ""
    config.reward.human_latents = ""  # safetensors file written by --stage=human_latents
    # Unit of α and β: "score", the SARM's own unit, or "sd", standard deviations of its score.
    config.reward.unit = "score"
    # Largest deduction from a response by penalties of features, latent KL, probe_penalty and
    # distance_penalty together, in standard deviations of the score; inf: no cap.
    config.reward.penalty_cap = 10.0
    # Dense probe: safetensors file written by --stage=train_probe, a direction p with its
    # threshold τ on the pooled state h. It needs no SAE.
    config.reward.probe = ""
    config.reward.probe_penalty = 0.0  # penalty, in `unit`, for a response with p · h > τ
    # True: a response on which a feature of penalize_features or the probe fires is not penalised
    # but left out of the update, as if it had not been sampled; alpha_values must then be empty and
    # probe_penalty 0.
    config.reward.screen = False
    # Mean and covariance of the states of human responses: safetensors file written by
    # --stage=human_latents with human_latents.states=True. They need no SAE.
    config.reward.human_states = ""
    # Penalty, in `unit`, per unit of the Mahalanobis distance of the pooled state from those of
    # human responses (Miao et al. 2510.13694).
    config.reward.distance_penalty = 0.0
    # Penalty, in `unit`, per token of a response; it does not count for penalty_cap.
    config.reward.length_penalty = 0.0
    # sigmoid: the score is replaced by a sigmoid of its distance from the reference responses' mean
    # score (PAR, 2502.18770), which is bounded to ± half a `unit`, and has a quarter of its slope;
    # empty: no bound.
    config.reward.bound = ""
    # How the scores of a SARM with several heads (train_sarm.heads) become one, in train and in
    # evaluate: "mean", or "min", the least of them. identify and probe read the mean.
    config.reward.ensemble = "mean"

    # The discriminators, whose logits estimate the latent KL.
    config.discriminator = ConfigDict()
    # Discriminators, each read on the rows that the others were trained on; 1: a single one, read
    # on the rows that it was trained on, whose estimate is too large.
    config.discriminator.folds = 4
    config.discriminator.learning_rate = 1e-3  # learning rate of AdamW
    config.discriminator.hidden_size = 64  # width of the hidden layer
    config.discriminator.steps = 16  # minibatches per PPO step
    config.discriminator.batch_size = 32  # human rows per minibatch, and as many policy rows
    config.discriminator.weight_decay = 1e-2  # weight decay of AdamW


def _add_guards(config: ConfigDict) -> None:
    # Checkpoints. These options do not affect results and may differ when a run is resumed.
    config.checkpoint = ConfigDict()
    # Checkpoints of every n-th PPO step are kept for good, besides the newest; 0: none are.
    config.checkpoint.keep_every = 0
    # Steps between the checkpoints of train_sarm, of its SAE and of its preferences; 0: there is
    # one only at SIGTERM or Ctrl-C. They are removed once the SARM is written.
    config.checkpoint.train_sarm_every = 500

    # Guards: warnings, in the log and in summary.json, if a metric shows that a run has gone wrong
    # (ppo/tracking/guards.py). Thresholds apply to columns of metrics.csv. These options do not
    # affect results and may differ when a run is resumed.
    config.guards = ConfigDict()
    # Guards that also end the run, with exit code 3; "all": every guard.
    config.guards.stop = ""
    config.guards.steps = 3  # consecutive PPO steps after which a guard warns
    # PPO steps with a skipped update, because it was not finite, that a run may have; one more ends
    # the run with exit code 3.
    config.guards.max_nonfinite_steps = 3
    # Largest |ratio − 1| in the first minibatch; warns above it, from the first step on.
    config.guards.ratio_0_max_dev = 1e-5
    # KL to the reference policy, in nats per response; warns above this and `ref_kl_per_token`.
    config.guards.ref_kl = 15.0
    # KL to the reference policy, in nats per response token; warns above this and `ref_kl`.
    config.guards.ref_kl_per_token = 0.1
    # KL of the updates, in nats per token, mean over updates (the first is 0); warns above it.
    config.guards.approx_kl = 0.1
    config.guards.disc_acc = 0.97  # accuracy of the discriminator; warns above it
    config.guards.entropy = 0.02  # entropy of the policy, in nats per token; warns below it
    # Distinct responses per distinct prompt of a batch; warns below it.
    config.guards.distinct_responses = 0.3
    config.guards.eos_fraction = 0.05  # share of responses that end; warns below it
    # Smallest penalty α, in standard deviations of the score; warns below it.
    config.guards.alpha_low = 0.1
    # Largest penalty α, in standard deviations of the score; warns above it.
    config.guards.alpha_high = 10.0


def _add_profile(config: ConfigDict) -> None:
    # A profiler trace of some PPO steps. Choose late steps, after everything is compiled.
    config.profile = ConfigDict()
    config.profile.start_step = -1  # first PPO step of the trace; -1: no trace
    config.profile.num_steps = 2  # PPO steps in the trace


def _add_human_latents(config: ConfigDict) -> None:
    # Stage human_latents: latents of human responses, for the latent KL and distance_penalty.
    config.human_latents = ConfigDict()
    # File of {"prompt", "response"} rows written by people.
    config.human_latents.demos_jsonl = ""
    # True: also writes human_states.safetensors, for reward.distance_penalty.
    config.human_latents.states = False


def _add_prepare_data(config: ConfigDict) -> None:
    # Stage prepare_data: makes the data that later stages read.
    config.prepare_data = ConfigDict()
    # "demonstrations": preference pairs of demonstrations and the policy's own responses. "lab":
    # the data and the models of the lab. "benchmarks": prompts, demonstrations, probes and test
    # sets from benchmark files.
    config.prepare_data.source = "demonstrations"
    # File of {"prompt", "response"} rows; for source=demonstrations.
    config.prepare_data.demos_jsonl = ""
    config.prepare_data.samples_per_prompt = 2  # responses sampled per prompt
    config.prepare_data.max_new_tokens = 64  # longest sampled response, in tokens
    config.prepare_data.temperature = 0.8  # sampling temperature
    config.prepare_data.seed = 0  # seed of sampling and of held-out sets

    # For source=benchmarks: comma-separated files of rows. Each of these options may be empty.

    # The folder steering/ of the SARM repository, with train/*/ and test/*/.
    config.prepare_data.steering_dir = ""
    config.prepare_data.rewardbench2 = ""  # files of RewardBench 2
    config.prepare_data.rm_bench = ""  # files of RM-Bench
    # Files of {"prompt", "chosen", "rejected"} pairs that differ in safety.
    config.prepare_data.safety_pairs = ""
    # Files of {"prompt", "chosen", "rejected"} pairs of anything else.
    config.prepare_data.complement_pairs = ""
    # Share of the prompts that goes into test sets; steering_dir has test sets of its own.
    config.prepare_data.held_out_fraction = 0.0


def _add_train_sarm(config: ConfigDict) -> None:
    # Stage train_sarm: a SARM on the first layers of a chat model.
    config.train_sarm = ConfigDict()
    config.train_sarm.model = ""  # model that the layers are taken from; empty: policy_model
    # Files of {"prompt", "chosen", "rejected"} pairs, comma-separated.
    config.train_sarm.pairs_jsonl = ""
    # Files of pairs, as in identify.pairs_jsonl, that enter training as ties: both sides are
    # equally good, and the rejected one has a shortcut which the reward must not pay for. Pairs in
    # pairs_jsonl teach the reward to prefer the chosen side instead. Empty: no ties.
    config.train_sarm.tie_pairs_jsonl = ""
    # Weight of a tie in the loss; a preference pair has the weight 1.
    config.train_sarm.tie_weight = 1.0
    # SARM whose SAE is used, instead of an SAE pretrained here with the options from sae_steps to
    # aux_weight. In mode 0, on the same model, both SARMs then have the same features; modes 2 and
    # 3 train the SAE further. source_layer, latent_size, k and use_topk must be the ones of that
    # SARM. Empty: an SAE is pretrained.
    config.train_sarm.sae_model = ""
    config.train_sarm.held_out_fraction = 0.2  # share of the prompts in the held-out set
    # Longest conversation, in tokens; a longer one loses its beginning.
    config.train_sarm.max_length = 4096
    config.train_sarm.source_layer = 16  # layers in the trunk
    config.train_sarm.latent_size = 65536  # latents of the SAE
    config.train_sarm.k = 192  # latents that TopK keeps per token
    # True: the head reads the latents after TopK; False: it reads the pre-activations.
    config.train_sarm.use_topk = True
    # What is trained on preferences. 0: the head; 1: trunk and head; 2: all, with the loss of
    # preferences and of reconstruction; 3: as 1, and the SAE, detached, on reconstruction.
    config.train_sarm.mode = 3
    # Weight λ of the reconstruction loss in modes 2 and 3.
    config.train_sarm.reconstruction_weight = 1.0
    # Largest number of activations that the SAE is pretrained on. While the stage runs, each takes
    # 4 bytes times the width of the model in the working directory.
    config.train_sarm.sae_tokens = 100_000
    config.train_sarm.sae_steps = 1000  # optimizer steps of SAE pretraining
    config.train_sarm.sae_batch_tokens = 512  # activations per step of SAE pretraining
    config.train_sarm.sae_learning_rate = 1e-3  # peak learning rate of SAE pretraining
    config.train_sarm.dead_after_steps = 100  # steps without activity after which a latent is dead
    config.train_sarm.aux_k = 256  # dead latents that reconstruct the residual
    config.train_sarm.aux_weight = 1 / 32  # weight of that auxiliary loss
    config.train_sarm.epochs = 3  # passes over the preference pairs
    config.train_sarm.batch_size = 16  # preference pairs per optimizer step
    # Pieces that these pairs are cut into in modes 1 to 3. The gradients of the pieces are added
    # up: less memory for more time.
    config.train_sarm.gradient_accumulation_steps = 1
    # Peak learning rate of the trunk, and of the SAE in modes 2 and 3.
    config.train_sarm.learning_rate = 2e-6
    config.train_sarm.head_learning_rate = 1e-3  # peak learning rate of the head
    config.train_sarm.weight_decay = 1e-3  # weight decay of AdamW
    config.train_sarm.warmup_fraction = 0.03  # share of the optimizer steps that is warm-up
    # Heads of an ensemble, each trained on pairs drawn with replacement from the training pairs;
    # 1: one head, trained on the pairs themselves. Mode 0 only. reward.ensemble combines them.
    config.train_sarm.heads = 1
    config.train_sarm.seed = 0  # seed of the held-out split, initial weights and batch order


def _add_train_sae(config: ConfigDict) -> None:
    # Stage train_sae: an SAE for a reward model that is a sequence classifier with one label.
    config.train_sae = ConfigDict()
    config.train_sae.model = ""  # the reward model: a directory, or a repository id on the hub
    # Files of {"prompt", "response"} rows or of {"prompt", "chosen", "rejected"} pairs,
    # comma-separated; both sides of a pair are responses.
    config.train_sae.responses_jsonl = ""
    config.train_sae.held_out_fraction = 0.2  # share of the prompts in the held-out set
    # Longest conversation, in tokens; a longer one loses its beginning.
    config.train_sae.max_length = 4096
    # Most states of response tokens that the SAE learns from besides the pooled states, which the
    # head reads; 0: only the pooled ones.
    config.train_sae.token_states = 0
    config.train_sae.latent_size = 16384  # latents of the SAE
    config.train_sae.k = 64  # latents that TopK keeps
    # topk: a kept latent may be negative, as in a SARM; topk_relu: it then becomes 0, as in
    # SAELens, in whose format only such an SAE can be written.
    config.train_sae.activation = "topk"
    config.train_sae.steps = 1000  # optimizer steps
    config.train_sae.batch_states = 512  # states per step
    config.train_sae.learning_rate = 1e-3  # peak learning rate
    config.train_sae.warmup_fraction = 0.03  # share of the optimizer steps that is warm-up
    config.train_sae.dead_after_steps = 100  # steps without activity after which a latent is dead
    config.train_sae.aux_k = 256  # dead latents that reconstruct the residual
    config.train_sae.aux_weight = 1 / 32  # weight of that auxiliary loss
    config.train_sae.seed = 0  # seed of the held-out split, initial weights and batch order


def _add_identify(config: ConfigDict) -> None:
    # Stage identify: which latents tell chosen from rejected responses.
    config.identify = ConfigDict()
    # Files of {"prompt", "chosen", "rejected"} pairs, comma-separated.
    config.identify.pairs_jsonl = ""
    # Files of pairs of a concise (chosen) and a longer answer, for the list verbosity_features;
    # empty: no such list.
    config.identify.verbosity_jsonl = ""
    config.identify.top_k = 10  # features per list
    config.identify.method = "differential"  # differential activation, or head_weight
    config.identify.tau_quantile = 0.98  # quantile of z on chosen responses that gives τ
    # Share of chosen responses that all detectors together may flag.
    config.identify.false_alarm_budget = 0.05
    # Pairs of several sources: pooled, or the mean over the sources ("sources").
    config.identify.combine = "pooled"
    config.identify.resamples = 1000  # bootstrap samples
    config.identify.examples = 5  # responses shown per feature
    # Responses per prompt of naming_prompts.jsonl; 0: the file is not written.
    config.identify.naming_examples = 10
    config.identify.seed = 0  # seed of everything that this stage draws at random
    # File of names of latents, which every stage shows beside their numbers: {"987": "flattery"},
    # the answers to naming_prompts.jsonl, or an export of Neuronpedia's explanations. Names change
    # no result: only the report is made again for them. Empty: no names.
    config.identify.feature_names = ""


def _add_train_probe(config: ConfigDict) -> None:
    # Stage train_probe: dense probes of the reward model's pooled states, from the pairs of
    # identify.pairs_jsonl with identify.false_alarm_budget and identify.seed, so that they can be
    # compared with the detectors. A reward model without an SAE can have them, too.
    config.train_probe = ConfigDict()
    # λ of the logistic regression: weight of ½ |w|² beside the mean loss of a response.
    config.train_probe.l2 = 1e-3


def _add_probe(config: ConfigDict) -> None:
    # Stage probe: how the reward changes if a feature is set to a value or kept within bounds.
    config.probe = ConfigDict()
    config.probe.feature = ""  # features to probe, each on its own
    # Value that the latent is set to; None: 0.0, or not set if a bound is given.
    config.probe.set_value = placeholder(float)
    config.probe.min_value = placeholder(float)  # lower bound of the latent; None: no bound
    config.probe.max_value = placeholder(float)  # upper bound of the latent; None: no bound
    # File of {"prompt", "response"} rows or pairs, or of {"prompt", "candidates"} rows.
    config.probe.data_jsonl = ""
    config.probe.mode = "pairs"  # pairs, or bestofn
    config.probe.rank = 1  # rank of the candidate that bestofn selects; 1: the best
    # Random features per probed feature, similar in firing rate and mean activation.
    config.probe.controls = 10
    config.probe.flips = 9999  # random sign flips in the test of a certificate
    config.probe.level = 0.05  # significance level of a certificate, after Holm's correction
    config.probe.seed = 0  # seed of controls and sign flips


def _add_evaluate(config: ConfigDict) -> None:
    # Stage evaluate: the SARM on benchmarks and under steering, without and with its controls (the
    # clamped and penalised features of `reward`, and steering_json); trained policies against the
    # base policy. Several files are comma-separated.
    config.evaluate = ConfigDict()
    # Steering file: {"48659": ["*", 0.0], "7": ["+", 1.5]} multiplies a latent or adds to it.
    config.evaluate.steering_json = ""
    # Files of {"question", "answer", "type"} rows, scored before and after steering: FILE or
    # NAME=FILE. Each type of each file is a set; files with the same name are one file.
    config.evaluate.data_jsonl = ""
    config.evaluate.num_example = 0  # answers of each set; 0: all
    # Types or sets that are meant to change; empty: the type "rejected", if there is one.
    config.evaluate.steering_targets = ""
    config.evaluate.resamples = 2000  # bootstrap samples for intervals
    config.evaluate.seed = 0  # seed of num_example, sampling and the bootstrap
    config.evaluate.rm_bench = ""  # files of RM-Bench, as in prepare_data
    config.evaluate.rewardbench2 = ""  # files of RewardBench 2, as in prepare_data
    # File of {"prompt"} rows that policies respond to, with up to ppo.max_new_tokens tokens;
    # empty: eval_prompts_jsonl.
    config.evaluate.prompts_jsonl = ""
    # Working directories of PPO runs to compare: DIR or NAME=DIR; empty: this run's own adapter.
    config.evaluate.runs = ""
    # File of {"prompt", "response"} rows by people, shown in latent_map.json.
    config.evaluate.human_jsonl = ""
    config.evaluate.temperature = 0.0  # sampling temperature; 0: greedy
    config.evaluate.samples = 1  # responses per prompt
    config.evaluate.batch_size = 32  # responses sampled at a time


def _add_plan(config: ConfigDict) -> None:
    # Stage plan: compiles every program of a PPO step, or the step of train_sarm on preferences,
    # from shapes alone, and reports its memory, traffic and time.
    config.plan = ConfigDict()
    # What is planned: train, train_sarm or identify. In a plan of train_sarm all conversations have
    # train_sarm.max_length tokens, and only target, policy_config, pairs and search of the options
    # below are read. In one of identify, the collection of the latents, they have sarm_max_length
    # tokens, and only target, sarm_config, pairs and search are read.
    config.plan.stage = "train"
    # Pairs of two responses whose latents identify collects, or whose states train_sarm collects.
    config.plan.pairs = 100_000
    # Machine: "host", or a name such as h100x4 or h200x8, which need not be present.
    config.plan.target = "host"
    # Directory with the policy's config.json; empty: policy_model (or train_sarm.model).
    config.plan.policy_config = ""
    # Directory with the config.json of the SARM, or of a classifier; empty: sarm_model. A
    # classifier without an SAE is planned with one of train_sae.latent_size and train_sae.k if the
    # section reward reads features, and otherwise as it is.
    config.plan.sarm_config = ""
    # JSON file {"tokens": number of prompts of that length with the chat template, …}; the plan
    # covers the lengths that a run pads its batches to. Empty: all prompts have the length
    # ppo.max_prompt_tokens.
    config.plan.prompt_lengths = ""
    # True: compares meshes of the target's devices, values of remat and accumulation steps.
    config.plan.search = False


def _add_report(config: ConfigDict) -> None:
    # Stage report: a page on one run, or on several side by side.
    config.report = ConfigDict()
    # Working directories (DIR or NAME=DIR) or metrics files (FILE.csv), comma-separated; empty:
    # this run.
    config.report.runs = ""
    config.report.samples = 200  # prompts of each run in the browser of responses; 0: all


def _add_lab(config: ConfigDict) -> None:
    # The reward-hacking lab: a task whose true reward is known (sarm_jax/lab).
    config.lab = ConfigDict()
    # "capitals": a small world and models that are trained from scratch. "animals", "lists",
    # "words", or a Python file with TASK: a task in English for a chat model
    # (docs/guides/own_task.md).
    config.lab.task = "capitals"
    config.lab.held_out_fraction = 0.2  # share of the combinations of countries that is held out
    # Responses with notes in the corpus of pretraining.
    config.lab.corpus_rows = 40_000
    config.lab.demonstrations = 4_000  # demonstrations in the data
    config.lab.pairs = 20_000  # preference pairs of the biased annotator
    config.lab.contrast_pairs = 1024  # pairs of a response with and without a shortcut
    # What the annotator pays for although the gold reward does not: flattery, and any of rambling,
    # echo and lucky_word (sarm_jax/lab/shortcuts.py), comma-separated.
    config.lab.shortcuts = "flattery"
    # The shortcuts that the method is told: the contrast pairs show them in turn, and no others.
    # For a task in English also "rotating:n": n shortcuts, which differ from seed to seed.
    config.lab.told_shortcuts = "flattery"
    # Layer at which pretraining takes a second loss; it is the SARM's source_layer.
    config.lab.tap_layer = 2
    config.lab.pretraining_steps = 2750  # optimizer steps of pretraining
    config.lab.pretraining_learning_rate = 3e-3  # peak learning rate of pretraining
    config.lab.tuning_steps = 200  # optimizer steps of tuning on demonstrations
    config.lab.tuning_learning_rate = 1e-3  # peak learning rate of tuning
    config.lab.batch_size = 64  # rows per optimizer step
    config.lab.seed = 0  # seed of a single stage; the study takes seeds from lab.seeds

    # The next options are only for tasks in English. prepare_data.samples_per_prompt and
    # prepare_data.max_new_tokens hold for the samples that their data are made of. The base model
    # samples at prepare_data.temperature; the logits of the tuned policy are divided by it, and the
    # policy samples at temperature 1.

    config.lab.base_model = ""  # HF directory of the chat model that the policy is tuned from
    config.lab.prompts = 256  # training prompts
    config.lab.held_out_prompts = 64  # prompts of evaluations, gates and the pool
    config.lab.label_noise = 0.1  # share of the preference pairs whose sides are exchanged
    # Factor of what the annotator pays for shortcuts; 0: a benign annotator, who pays for none.
    config.lab.annotator_bias = 1.0


def _add_study(config: ConfigDict) -> None:
    # The study, --stage=all: every seed under every condition (sarm_jax/lab/conditions.py).
    config.lab.seeds = "0"  # comma-separated seeds or ranges such as 10-19
    config.lab.conditions = "baseline,full"  # names of conditions, comma-separated
    config.lab.processes = 1  # seeds that run at the same time, each in a process of its own
    # Conditions of a seed that are trained at a time, over one copy of the models, like
    # experiments_at_once.
    config.lab.conditions_at_once = 1
    config.lab.alpha = 2.0  # penalty per detector that fires, in reward.unit
    config.lab.beta = 0.1  # weight of the latent KL on the carriers, in reward.unit per nat
    # Weight of a contrast pair in the condition ties. At about pairs / contrast_pairs all ties
    # together weigh as much as all preference pairs.
    config.lab.tie_weight = 20.0
    # Penalty of the condition distance per unit of Mahalanobis distance, in reward.unit.
    config.lab.distance_penalty = 0.5
    # The condition untold: penalty per feature above the threshold that human responses seldom
    # reach, in reward.unit, and the largest penalty of a response, in standard deviations of the
    # score like reward.penalty_cap.
    config.lab.untold_alpha = 0.5
    config.lab.untold_cap = 4.0
    config.lab.length_penalty = 0.2  # penalty of the condition length per token, in reward.unit
    # Responses to each prompt of a pool that every condition ranks, once the conditions of a seed
    # are trained; best of n has n up to half of them. 0: no pool.
    config.lab.pool_responses = 0
    config.lab.pool_prompts = 64  # held-out prompts of the pool
    # Slots in which the pool, and the responses that a task's data are made of, are sampled. A slot
    # whose response has ended is refilled with the next prompt. 0: none is refilled.
    config.lab.sampling_slots = 0
    # Conditions that rank the pool and are not trained. With them, lab.conditions may be empty.
    config.lab.ranked_conditions = ""
    # True: in train, the reward model has a further feature for each of the lab's shortcuts, which
    # counts it in the words of a response. The condition oracle penalises these.
    config.lab.oracle = False
    # File of gates written by identify; PPO refuses to start if a gate failed.
    config.lab.gates_json = ""
    config.lab.ignore_failed_gates = False  # True: PPO starts anyway and reports the failed gates
