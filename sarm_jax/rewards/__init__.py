"""The compound reward: terms, human latents, and the discriminator behind the latent KL."""
