"""The writes of a memory, tile after tile: the sequential kernel of both scans (SPEC 2.1). See README.md and `triton_.py`."""
