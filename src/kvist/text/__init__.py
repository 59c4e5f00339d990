"""Text in and text out: tokenizers, chat templates, detokenisation, stop strings.

Nothing here knows of tensors, models or caches. Callers are the loader, which attaches a
tokenizer to a model, and whatever turns a user's words into token ids and tokens back into words.
"""
