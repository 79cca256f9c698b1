"""Request and response bodies of the API: what is legal whatever the engine, and nothing else."""
