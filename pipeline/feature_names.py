"""The names of features that a config gives, for every stage that shows a feature.

Names are for readers. They change no result, so no stage but the report is run again for them, and
a run of PPO can be resumed with other names.
"""

from ml_collections import ConfigDict

from sarm_jax.features.feature_names import NO_NAMES, FeatureNames, read_feature_names


def feature_names(config: ConfigDict, latent_size: int | None = None) -> FeatureNames:
    """Reads `identify.feature_names`; without a file there are no names.

    Args:
        config: the config.
        latent_size: the number of latents of the reward model; None: it is not known yet.

    Raises:
        InputError: the file is malformed, or names a latent that does not exist.
    """
    path = config.identify.feature_names
    names = read_feature_names(path) if path else NO_NAMES
    if latent_size is not None:
        names.check(latent_size)
    return names
