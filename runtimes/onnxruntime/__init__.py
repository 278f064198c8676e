"""ONNX Runtime: the encoder, the LLM and the codec decoder of ONNX bundles, on the CPU or a CUDA device."""
