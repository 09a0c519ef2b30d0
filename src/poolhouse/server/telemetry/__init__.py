"""Telemetry: the observer of requests, and what it feeds: log, metrics, traces."""
