"""Files of other precisions and graphs from a verified FP32 file: the floor that imports onnx, not torch."""
