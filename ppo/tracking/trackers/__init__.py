"""Where a run is shown while it trains: TensorBoard, Weights & Biases, Trackio."""
