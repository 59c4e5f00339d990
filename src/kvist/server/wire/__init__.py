"""What goes over the wire: the bodies of requests and answers, as pydantic models.

Only shapes and their checks. Names and defaults are OpenAI's where it has them; what kvist adds
(`top_k`, `min_p`, `cache_salt`, `chat_template_kwargs` …) is named as vLLM and others name it.
Unknown parameters are refused, since a misspelt one would be obeyed by nobody.
"""
