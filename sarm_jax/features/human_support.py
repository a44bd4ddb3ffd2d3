"""Thresholds that bound every feature to what human responses reach, without any contrast pairs.

    τ_i = the 99.5 % quantile of z_i over human responses

A feature that no human response activates has τ = 0. A penalty on all features above these
thresholds keeps a policy within the support of the human responses, whatever the shortcut; it does
not keep it from the end of that support.
"""

import numpy as np

QUANTILE = 0.995


def human_support(z_nf: np.ndarray) -> np.ndarray:
    """Returns the thresholds `[F]` float32 of features `[N, F]` of human responses.

    They are rounded up, so that a response at the quantile is not above it.
    """
    quantile_f = np.quantile(z_nf.astype(np.float64), QUANTILE, axis=0)
    tau_f = quantile_f.astype(np.float32)
    return np.where(tau_f < quantile_f, np.nextafter(tau_f, np.float32("inf")), tau_f)
