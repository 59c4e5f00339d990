"""The server: OpenAI's HTTP API on one `AsyncLLM`.

`app.create_app` makes the application, `run.serve` runs it under uvicorn; `kvist serve` calls both.
The engine knows nothing of this room, and nothing here computes: requests are checked, turned into
prompts and sampling parameters, and what the engine streams back is written as JSON.
"""
