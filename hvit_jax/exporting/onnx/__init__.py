"""Models as ONNX files: a traced program is translated, operation by operation."""
