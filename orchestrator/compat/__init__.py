"""TensorRT-LLM's in-process API: from_hugging_face, quantize, save_checkpoint, build."""
