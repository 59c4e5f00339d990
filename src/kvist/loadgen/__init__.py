"""An open-loop load generator for any server that speaks OpenAI's API.

Open loop: when each request is due is fixed before the first is sent, so a slow server meets the
same load as a fast one, and latency counts from when a request was due. `workload` and `traces` say
what is asked and when, `client` speaks HTTP, `drive` sends and measures, `report` sums up.
"""
