"""Token shards: their files, the checks before a run, and the loader. Needs numpy, not torch."""
