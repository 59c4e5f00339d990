"""From a name to weights in memory: find a model, fetch it, read its files.

`hub` turns a name into a path and `pull` fetches a model; neither imports torch. `checkpoint`
opens a path, a directory of safetensors or a GGUF file, and fills a module with its weights.
"""
