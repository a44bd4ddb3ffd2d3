"""Every flag of the reference implementation's programs, as their argument parsers define them."""

PPO_FLAGS = (
    "policy_model sarm_model prompts_jsonl output_dir experiment_name batch_size "
    "gradient_accumulation_steps learning_rate total_steps ppo_epochs clip_range vf_coef "
    "max_grad_norm seed lora_r lora_alpha lora_dropout max_new_tokens temperature top_p "
    "penalize_features tau_values alpha_values clamp_features clamp_max_values clamp_min_values "
    "clamp_set_values human_latents beta latent_indices disc_lr"
).split()
OTHER_FLAGS = (
    "demos_jsonl out model_name batch_size latent_indices dtype data_jsonl out_csv feature "
    "set_value min_value max_value mode top_k model_path data_path output_dir interpret openai_key "
    "device output_file steering_path output_path plot_path num_example tokenizer_path "
    "sarm_base_model max_length lr config_file main_process_port quick"
).split()
