"""What a reward model and its policies are worth: steering, public benchmarks, comparisons."""
