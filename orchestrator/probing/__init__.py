"""``isotrain submit --probe``: nodes are tried before a job trains on them, and bad ones left out."""
