"""Dialects: each turns its bodies into requests and answers into its bodies. A new one is a file and a line here."""

from __future__ import annotations

from poolhouse.server.dialects import openai, voyage
from poolhouse.server.routing import Dialect

# Of routes at one path and method, the first counts.
DIALECTS: tuple[Dialect, ...] = (
    openai.DIALECT,
    voyage.DIALECT,
)
