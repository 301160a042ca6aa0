"""Reads of a memory in all tiles of a sequence at once, given its states: the parallel half of the memory scan. See README.md."""
