"""Jobs: whole files through a model, in bounded memory; a job that was stopped goes on where it was."""
