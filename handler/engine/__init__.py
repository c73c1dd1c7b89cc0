"""The engine: takes jobs, gives events; the only part of the server that holds a model."""
