"""Part of apex's build; only its presence is looked at."""
