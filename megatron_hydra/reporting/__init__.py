"""What a run leaves for people to look at: file names, charts, a page. Imports nothing heavy."""

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
"""In a run's output folder: an entry a step; and what happened to it, over all attempts."""

PHASES = ("data", "forward_backward", "optimizer", "validation", "save")
"""Parts of a step whose seconds are measured."""
