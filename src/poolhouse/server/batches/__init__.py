"""Batches: files of requests in OpenAI's form, through the routes of this server, behind all live requests."""
