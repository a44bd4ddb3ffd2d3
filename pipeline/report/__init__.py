"""The report: what one run, or several side by side, did to the policy, as one HTML page."""
