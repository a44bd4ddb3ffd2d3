"""Evaluation of a reward model: public benchmarks, steering, and the data made from benchmarks."""
