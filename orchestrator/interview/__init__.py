"""``isotrain init``: a few questions, each with what was found here as its answer, and a job file."""
