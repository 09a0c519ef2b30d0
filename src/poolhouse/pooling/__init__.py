"""Hidden states in, answers out: a pooler is a pipeline of steps over rows."""
