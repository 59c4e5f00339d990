"""kvist: LLM inference with the KV cache at its centre."""
