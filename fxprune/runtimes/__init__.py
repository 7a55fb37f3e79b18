"""What a model runs in beside plain PyTorch: ONNX Runtime, and what ``torch.compile`` makes."""
