"""Before a job starts: what it will cost (`estimate`) and whether its layout can be built (`dry_run`)."""
