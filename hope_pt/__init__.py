"""HOPE-PT: a pretraining stack for HOPE (self-modifying Titans + continuum memory system). Import submodules directly."""
