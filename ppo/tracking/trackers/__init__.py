"""Services that show a run while it trains: TensorBoard, Weights & Biases, Trackio."""
