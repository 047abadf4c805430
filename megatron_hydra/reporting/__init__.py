"""Reports of a run: file names, charts, and an HTML page. Imports no heavy packages."""

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
"""Files in a run's output folder: one entry per step, and the events of all attempts."""

PHASES = ("data", "forward_backward", "optimizer", "validation", "save")
"""Phases of a step whose seconds are measured."""
